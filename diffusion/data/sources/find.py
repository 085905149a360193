"""Find the source images: those that the user names, an archive that lies here, or the public one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusion.data.codecs import SUFFIXES
from diffusion.data.sources import generated
from diffusion.data.sources.download import download_eurosat
from diffusion.data.sources.eurosat import (
    CLASSES,
    EUROSAT_DIGEST,
    EUROSAT_IMAGES,
    LICENCE,
    MIRRORS,
    MS_ARCHIVES,
    read_archive,
    read_eurosat,
    read_eurosat_ms,
)
from diffusion.data.sources.files import files_below
from diffusion.data.sources.own import read_own
from diffusion.data.sources.source import AS_IT_IS, Source, SourceOptions
from diffusion.data.sources.tables import (
    WEBDATASET,
    find_tars,
    is_webdataset,
    read_parquet,
    read_webdataset,
    tables_in,
    tars_name,
)
from diffusion.data.sources.transfer import Progress
from diffusion.errors import DataError
from diffusion.settings import Settings
from diffusion.trust.redaction import shown

GENERATED, EUROSAT, EUROSAT_MS = "generated", "eurosat", "eurosat-ms"
KNOWN_NAMES = (EUROSAT, EUROSAT_MS, generated.NAME.lower())
"""Of the datasets that this package knows."""


def find_archive(source: str, settings: Settings, progress: Progress | None = None) -> Path:
    """Where the images lie that `source` means.

    `eurosat`: EUROSAT_ARCHIVE if it is set; else an archive in the downloads folder; else the public archive, downloaded.
    `eurosat-ms`: its archive of 13 bands in the downloads folder. `generated`: drawn patches, made here. Tars: the folder
    with the copies of those that lie elsewhere. Anything else is a path. Raises DataError if there is none and it can't be
    downloaded, StoreError if a server does not answer.
    """
    if source == GENERATED:
        path = settings.downloads / f"{generated.NAME}-{generated.VERSION}.zip"
        return path if path.exists() else generated.write_archive(path)
    if source == EUROSAT_MS:
        return _find_ms(settings)
    if is_webdataset(source):
        copies = settings.downloads / "tars"
        find_tars(source, copies, progress)
        return copies
    if source != EUROSAT:
        path = Path(source).expanduser()
        if "\0" in source or not path.exists():
            raise DataError(
                f"There are no images at {shown(source)}, looked for from {Path.cwd()}. A source is '{EUROSAT}', '{EUROSAT_MS}', "
                f"'{GENERATED}', the path of a folder, zip, tar or Parquet table, or WebDataset tars: '{WEBDATASET}/path/"
                "{000..012}.tar', s3://… or https://…"
            )
        return path
    if settings.archive is not None:
        if not settings.archive.exists():
            raise DataError(
                f"No archive at {shown(str(settings.archive))}. Set EUROSAT_ARCHIVE to the EuroSAT zip or its unpacked folder."
            )
        return settings.archive
    for mirror in MIRRORS:
        if (settings.downloads / mirror.file_name).exists():
            return settings.downloads / mirror.file_name
    return download_eurosat(settings.downloads, progress=progress)


def _find_ms(settings: Settings) -> Path:
    for name in MS_ARCHIVES:
        if (settings.downloads / name).exists():
            return settings.downloads / name
    raise DataError(
        f"There is no {' or '.join(MS_ARCHIVES)} in {settings.downloads}. Put it there (2 GB, "
        "https://zenodo.org/records/7711810), or name its path as the source."
    )


def read_source(source: str, path: Path, options: SourceOptions = AS_IT_IS) -> Source:
    """Read what `find_archive` found. Raises DataError if it is not what it should be."""
    if source in (GENERATED, EUROSAT) and options != AS_IT_IS:
        raise DataError(f"The source '{source}' has no options: it is what it is. Name the path of your images.")
    if source == GENERATED:
        return read_archive(path, name=generated.NAME, licence=generated.LICENCE)
    if source == EUROSAT:
        return read_eurosat(path)
    if source == EUROSAT_MS:
        return read_eurosat_ms(path, options)
    if is_webdataset(source):
        return _with_own_name(read_webdataset(find_tars(source, path), tars_name(source), options))
    if path.suffix == ".parquet" or (path.is_dir() and _holds_tables(path)):
        return _with_own_name(read_parquet(path, options))
    found = read_own(path, options)
    if found.classes != CLASSES or options != AS_IT_IS:
        return _with_own_name(found)
    if found.images[0].file_name.endswith(".tif"):
        return read_eurosat_ms(path, options)
    if found.digest == EUROSAT_DIGEST:
        return Source("EuroSAT", LICENCE, found.images, found.digest, options, CLASSES)
    if len(found.images) == EUROSAT_IMAGES:
        raise DataError(
            f"{path} is laid out like EuroSAT but holds other images: its content digest is {found.digest[:16]}…, expected "
            f"{EUROSAT_DIGEST[:16]}…. Get the archive again, or give these images a name of their own: "
            '-p source_options=\'{"name": "…"}\'.'
        )
    return _with_own_name(found)


def _holds_tables(folder: Path) -> bool:
    """Whether a folder is one of Parquet tables: they lie in it, or below it where no images do."""
    tables = tables_in(folder)
    if not tables or any(table.parent == folder for table in tables):
        return bool(tables)
    return not any(file.suffix.lower() in SUFFIXES for file in files_below(folder))


def _with_own_name(found: Source) -> Source:
    """Models compete under their dataset's name: images that are not one of the known datasets never have its name.

    Raises DataError if the user gave them one.
    """
    if found.name.lower() not in KNOWN_NAMES or found.digest == EUROSAT_DIGEST:
        return found
    if found.options.name:
        raise DataError(
            f"The name '{found.name}' is that of a dataset which these images are not. Give them another: "
            '-p source_options=\'{"name": "…"}\'.'
        )
    return replace(found, name=f"{found.name}-{found.digest[:8]}")
