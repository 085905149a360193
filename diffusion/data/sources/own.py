"""Images of one's own: a folder, zip or tar of class folders, a flat one, or one with a metadata.csv.

A folder directly under the one that holds all images is a class. Where all images lie in one folder they have no classes.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath

from diffusion.data.codecs import SUFFIXES
from diffusion.data.sources.files import LOST_AND_FOUND, name_in_zip, read_files
from diffusion.data.sources.limits import File, Limits, Meter
from diffusion.data.sources.source import Source, SourceImage, SourceOptions, make_source
from diffusion.data.sources.tars import TAR_SUFFIXES
from diffusion.errors import DataError
from diffusion.trust.redaction import shown

METADATA = "metadata.csv"
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}
"""Folders by which others split a dataset."""
FILE_COLUMNS, LABEL_COLUMNS = ("file_name", "file", "path", "image"), ("label", "class", "category")
"""What the columns of a table may be called."""
LIMITS = Limits()


def read_own(path: Path, options: SourceOptions) -> Source:
    """The images of a folder or archive. Raises DataError if it holds none, or what it holds can't be told apart."""
    name = options.name or name_of(path)
    return make_source(name, options.licence, _images(path), options)


def name_of(path: Path) -> str:
    """A dataset's name, from that of its folder or file."""
    stem = path.name
    for suffix in (*TAR_SUFFIXES, ".zip", ".parquet"):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-")[:40].strip("-") or "images"


def _images(path: Path) -> Iterator[SourceImage]:
    files: Files = {}
    tables: list[File] = []
    for relative, read in read_files(path, LIMITS, _is_used):
        if relative.name == METADATA:
            tables.append((relative, read))
        # Of a tar that was added to, the last of a name counts.
        elif relative in files and not path.name.endswith(TAR_SUFFIXES):
            raise DataError(f"{path} holds two files {shown(str(relative))}. Keep one, or rename it.")
        else:
            files[relative] = read
    if not files:
        raise DataError(f"{path} holds no images. Files of these kinds are read: {', '.join(SUFFIXES)}.")
    tables = [table for table in tables if not _is_hidden(table[0], _root(files))]
    if len(tables) > 1:
        raise DataError(
            f"{path} holds several tables: {', '.join(sorted(shown(str(name)) for name, _ in tables[:4]))}. Leave one that names "
            "all images, or bring one of their folders."
        )
    labelled = _by_table(path, *tables[0], files) if tables else _by_folder(path, files)
    meter = Meter(path, LIMITS)
    for class_name, file_name, read in labelled:
        content = meter.count(read())
        yield SourceImage.of(class_name, file_name, content, read)


def _is_used(name: PurePosixPath) -> bool:
    if name.name == METADATA:
        return True
    return name.suffix.lower() in SUFFIXES and not name.name.startswith(".") and "__MACOSX" not in name.parts


Files = dict[PurePosixPath, Callable[[], bytes]]
"""By name, how a file's content is read."""


def _root(files: Files) -> tuple[str, ...]:
    """The folder that all lie in."""
    parents = {name.parent.parts for name in files}
    return PurePosixPath(os.path.commonpath(["/".join(parts) for parts in parents])).parts


def _is_hidden(name: PurePosixPath, root: tuple[str, ...]) -> bool:
    """Whether a folder under the one that holds all is hidden, as that of thumbnails is."""
    return any(part.startswith(".") for part in name.parts[len(root) : -1])


Labelled = Iterator[tuple[str, str, Callable[[], bytes]]]
"""Class (empty: none), file name, and how its content is read."""


def _by_folder(path: Path, files: Files) -> Labelled:
    all_in = _root(files)
    files = {name: read for name, read in files.items() if not _is_hidden(name, all_in)}
    root = _root(files)
    if len({name.parent for name in files}) == 1:  # one folder: no classes
        for relative, read in files.items():
            yield "", relative.name, read
        return
    if loose := [relative for relative in files if relative.parent.parts == root]:
        raise DataError(
            f"{path} holds images in class folders, and beside them {shown(str(loose[0]))}"
            f"{f' and {len(loose) - 1:,} more' if len(loose) > 1 else ''}. Put each into a class folder, or all into one folder."
        )
    depth = len(root)
    classes = {relative.parts[depth] for relative in files}
    if {name.lower() for name in classes} <= PARTS:
        raise DataError(
            f"{path} holds the folders {', '.join(sorted(map(shown, classes)))}: parts of a dataset, which would be taken for "
            f"classes. Bring one of them, or all class folders in one: a tenth is held out here. Or name classes in a {METADATA}."
        )
    if empty := sorted(_folders(path, root) - classes):
        raise DataError(
            f"{path} has class folders without images: {', '.join(map(shown, empty))}. Fill or delete them."
        )
    for relative, read in files.items():
        yield relative.parts[depth], "/".join(relative.parts[depth + 1 :]), read


def _folders(path: Path, root: tuple[str, ...]) -> set[str]:
    """The folders directly under the one that holds all images; of a tar only those that hold something are known."""
    if path.is_dir():
        top = path.joinpath(*root[1:])
        there = {entry.name for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
        return there - {LOST_AND_FOUND}
    if path.name.endswith(TAR_SUFFIXES):
        return set()
    with zipfile.ZipFile(path) as archive:
        folders = [name_in_zip(member.filename).parts for member in archive.infolist() if member.is_dir()]
    return {parts[-1] for parts in folders if parts[:-1] == root and not parts[-1].startswith((".", "__MACOSX"))}


def _rows(path: Path, read: Callable[[], bytes]) -> Iterator[dict[str, str]]:
    try:
        rows = csv.DictReader(io.StringIO(read().decode("utf-8-sig")), skipinitialspace=True)
        names = [name.strip().lower() for name in rows.fieldnames or ()]
        if twice := {name for name in names if names.count(name) > 1} & {*FILE_COLUMNS, *LABEL_COLUMNS}:
            raise DataError(f"{path}: {METADATA} has several columns {', '.join(sorted(twice))}. Keep one.")
        rows.fieldnames = names
        yield from ({name: (value or "").strip() for name, value in row.items() if name in names} for row in rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: {METADATA} is no table in UTF-8 ({error}).") from error


def _by_table(path: Path, table: PurePosixPath, read: Callable[[], bytes], files: Files) -> Labelled:
    rows = _rows(path, read)  # one by one: a row takes a hundred times what it takes in the file
    first = next(rows, {})
    columns = list(first)
    file_column = next((name for name in FILE_COLUMNS if name in columns), None)
    label_column = next((name for name in LABEL_COLUMNS if name in columns), None)
    if file_column is None:
        raise DataError(
            f"{path}: {METADATA} has no column with files: it must be called one of {', '.join(FILE_COLUMNS)}, and the one "
            f"with classes, if there are any, one of {', '.join(LABEL_COLUMNS)}."
        )
    for number, row in enumerate(chain([first], rows), start=2):
        if number - 1 > len(files):
            raise DataError(f"{path}: {METADATA} has more lines than there are images. Name each once.")
        file = table.parent / (row[file_column] or "")
        label = (row[label_column] or "") if label_column else ""
        if file not in files:
            raise DataError(
                f"{path}: line {number} of {METADATA} names {shown(str(row[file_column]))}, which is not there."
            )
        if label_column and not label:
            raise DataError(f"{path}: line {number} of {METADATA} names no class.")
        yield label, row[file_column], files[file]
