"""Find the source images: the archive that the user names, one that lies here, or the public one."""

from __future__ import annotations

from pathlib import Path

from diffusion.data import generated
from diffusion.data.download import Progress, download_eurosat
from diffusion.data.eurosat import MIRRORS, Source, read_archive, read_eurosat
from diffusion.errors import DataError
from diffusion.settings import Settings
from diffusion.trust.redaction import shown

GENERATED = "generated"
EUROSAT = "eurosat"


def find_archive(source: str, settings: Settings, progress: Progress | None = None) -> Path:
    """The path of the archive that `source` means.

    `eurosat`: EUROSAT_ARCHIVE if it is set; else an archive in the downloads folder; else the public archive, downloaded.
    `generated`: drawn patches, made here. Anything else is the path of a EuroSAT archive.
    Raises DataError if there is none and it can't be downloaded.
    """
    if source == GENERATED:
        path = settings.downloads / f"{generated.NAME}-{generated.VERSION}.zip"
        return path if path.exists() else generated.write_archive(path)
    named = settings.archive if source == EUROSAT else Path(source).expanduser()
    if named is not None:
        if "\0" in str(named) or not named.exists():
            raise DataError(
                f"No archive at {shown(str(named))}. Set EUROSAT_ARCHIVE to the EuroSAT zip or its unpacked folder."
            )
        return named
    for mirror in MIRRORS:
        if (settings.downloads / mirror.file_name).exists():
            return settings.downloads / mirror.file_name
    return download_eurosat(settings.downloads, progress=progress)


def read_source(source: str, path: Path) -> Source:
    """Read what `find_archive` found. Raises DataError if it is not what it should be."""
    if source == GENERATED:
        return read_archive(path, name=generated.NAME, licence=generated.LICENCE)
    return read_eurosat(path)
