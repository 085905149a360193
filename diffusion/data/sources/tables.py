"""Images in WebDataset tars, read by the `webdataset` library, and in Parquet tables as Hugging Face lays them out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from diffusion.data.codecs import SUFFIXES, file_format
from diffusion.data.sources.files import files_below
from diffusion.data.sources.limits import Limits, Meter, Spool, damaged
from diffusion.data.sources.own import LABEL_COLUMNS, name_of
from diffusion.data.sources.remote import check_address, copy_tars, expand
from diffusion.data.sources.source import Source, SourceImage, SourceOptions, make_source
from diffusion.data.sources.tars import check_tar, unpacked
from diffusion.data.sources.transfer import Progress
from diffusion.errors import DataError, UserError
from diffusion.trust.reading import parse_json
from diffusion.trust.redaction import shown

WEBDATASET = "webdataset:"
"""How a source begins that is WebDataset tars of this machine: `webdataset:/data/train-{000..012}.tar`."""
IMAGE_COLUMNS = ("image", "img")
LIMITS = Limits()
ROWS = 4
"""Of a table, read at once: a value may stand once in the file and in every row, whatever the file says of its size."""
ROWS_BYTES = 64 << 20
"""That they may have by what the file says: of larger ones, fewer are read at once."""
GROUP_BYTES = 64 << 30
"""That a group of rows may have by what the file says."""


def is_webdataset(source: str) -> bool:
    """Whether a source means WebDataset tars: by its beginning, or because it lies elsewhere."""
    return source.startswith(WEBDATASET) or "://" in source


def tars_meant(source: str) -> list[str]:
    """The paths or addresses that a source means. Raises DataError if they are none that can be read, or show a password."""
    names = expand(source.removeprefix(WEBDATASET))
    if any("://" in name for name in names):
        for name in names:
            check_address(name)
    return names


def find_tars(source: str, folder: Path, progress: Progress | None = None) -> list[Path]:
    """The tars that a source means, those of other machines copied into `folder`. Raises DataError if one is missing."""
    names = tars_meant(source)
    if "://" in names[0]:
        return copy_tars(names, folder, progress)
    tars = [Path(name).expanduser().absolute() for name in names]
    for tar in tars:
        if not tar.is_file():  # nor a pipe: the library would run a command
            raise DataError(f"There is no tar at {shown(str(tar))}.")
    return tars


def tars_name(source: str) -> str:
    """What a dataset of these tars is called: as they are, without their numbers."""
    # What follows a `?` may be a key, and a name is seen by all.
    path = urlsplit(source).path if "://" in source else source
    return name_of(Path(re.sub(r"[-_.]?(\{.*|\d+)$", "", path.rpartition("/")[2].removesuffix(".tar")) or "tars"))


def read_webdataset(tars: list[Path], name: str, options: SourceOptions) -> Source:
    """The images of WebDataset tars, with classes from `cls`, `txt` or `json` where there are any.

    Raises DataError if a tar is cut off, or a sample has no image.
    """
    return make_source(options.name or name, options.licence, _of_tars(tars), options)


def _of_tars(tars: list[Path]) -> Iterator[SourceImage]:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    meter, spool = Meter(tars[0], LIMITS), Spool()
    for tar in tars:
        try:
            check_tar(tar, LIMITS)
            with unpacked(tar) as stream:
                for sample in group_by_keys(tar_file_expander([{"url": str(tar), "stream": stream}])):
                    key = str(sample["__key__"])
                    found = [name for name in sample if f".{name.lower().rpartition('.')[2]}" in SUFFIXES]
                    if len(found) != 1:
                        raise DataError(f"{tar}: the sample {shown(key)} has {len(found)} images: one is needed.")
                    content = meter.count(sample[found[0]])
                    yield _kept(spool, _label(sample, tar), f"{key.rpartition('/')[2]}.{found[0]}", content)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # whatever tarfile and the library make of it
            raise damaged(tar, f"is not a whole WebDataset tar ({error}). Get it again.", error) from error


def _label(sample: dict[str, Any], tar: Path) -> str:
    for name in ("cls", "txt"):
        if name in sample:
            return str(sample[name].decode("utf-8")).strip()
    if "json" in sample:
        fields = parse_json(sample["json"])
        for name in LABEL_COLUMNS:
            if isinstance(fields, dict) and name in fields:
                return _class(fields[name], [], tar)
        raise DataError(f"{tar}: {shown(str(sample['__key__']))}.json has none of {', '.join(LABEL_COLUMNS)}.")
    return ""


def read_parquet(path: Path, options: SourceOptions) -> Source:
    """The images of a Parquet file, or of all in a folder. Raises DataError if one is damaged or has no column of images."""
    files = tables_in(path) if path.is_dir() else [path]
    return make_source(options.name or name_of(path), options.licence, _of_tables(path, files), options)


def tables_in(folder: Path) -> list[Path]:
    """The Parquet files in a folder and those below, but for hidden ones."""
    found = (file for file in files_below(folder) if file.suffix == ".parquet")
    seen = {file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts)}
    # A link may lead to what lies here as well.
    once = {os.path.realpath(file): file for file in sorted(seen, reverse=True)}
    return sorted(once.values())


def _of_tables(path: Path, files: list[Path]) -> Iterator[SourceImage]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    meter, spool = Meter(files[0], LIMITS), Spool()
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            image, label, names = _columns(file, table.schema_arrow)
            number = 0
            stem = file.stem if file == path else "-".join(file.relative_to(path).with_suffix("").parts)
            for batch in table.iter_batches(_at_once(table), columns=[image] + ([label] if label else [])):
                for row in batch.to_pylist():
                    cell = row[image]
                    content = cell["bytes"] if isinstance(cell, dict) else cell
                    if not isinstance(content, bytes):
                        raise DataError(f"{file}: row {number} holds no image, only where one is.")
                    named = cell.get("path") if isinstance(cell, dict) else None
                    file_name = Path(named).name if named else f"{stem}-{number:08d}"
                    if not named or "." not in file_name:
                        file_name += f".{file_format(content)}"
                    class_name = "" if label is None else _class(row[label], names, file)
                    yield _kept(spool, class_name, file_name, meter.count(content))
                    number += 1
        except UserError:
            raise
        except Exception as error:  # the library lets a dozen kinds through
            raise damaged(file, f"is not a whole Parquet table of images ({error}). Get it again.", error) from error


def _at_once(table: Any) -> int:
    """Rows: each could be as large as its column."""
    groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > GROUP_BYTES:
        raise DataError(f"A group of its rows has {largest:,} bytes, and {GROUP_BYTES:,} are the most.")
    return max(1, min(ROWS, ROWS_BYTES // max(1, largest)))


def _columns(file: Path, schema: Any) -> tuple[str, str | None, list[str]]:
    """The columns of images and classes, and the names of these if the table's metadata has them."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    if image is None:
        raise DataError(
            f"{file} has no column of images: one called {' or '.join(IMAGE_COLUMNS)} is needed, and for classes one called "
            f"{' or '.join(LABEL_COLUMNS)}. It has: {', '.join(map(shown, schema.names))}."
        )
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (ValueError, KeyError, TypeError):
        names = []
    return image, label, names


def _class(value: Any, names: list[str], where: Path) -> str:
    """The name of a class, from a label: text, or a number that counts the names; null: none."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():  # as tables have whole numbers with gaps between them
        value = int(value)
    if not isinstance(value, (str, int)):
        raise DataError(f"{where}: a label is neither text nor a whole number: {shown(repr(value))}.")
    if isinstance(value, int) and names:
        if not 0 <= value < len(names):
            raise DataError(f"{where}: a row has the label {value}, and there are {len(names)} classes.")
        return names[value]
    return str(value)


def _kept(spool: Spool, class_name: str, file_name: str, content: bytes) -> SourceImage:
    return SourceImage.of(class_name, file_name, content, spool.keep(content))
