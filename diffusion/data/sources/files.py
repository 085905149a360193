"""The files of a folder, a zip or a tar, without trusting any of it: limits hold on what is read, not on what is declared."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from diffusion.data.sources.limits import USUAL, File, Limits, archive_errors, check_member, too_much
from diffusion.data.sources.tars import TAR_SUFFIXES, tar_files
from diffusion.errors import DataError
from diffusion.trust.reading import passes, read_at_most, read_file, unreadable
from diffusion.trust.redaction import shown

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Others may ask for gigabytes of memory for a few bytes."""
LOST_AND_FOUND = "lost+found"


def read_files(
    path: Path, limits: Limits = USUAL, wanted: Callable[[PurePosixPath], bool] = lambda name: True
) -> Iterator[File]:
    """The files of a folder, zip or tar. Raises DataError if it is missing, damaged, unsafe or too large.

    Args:
        wanted: which of them. Of a tar no others are kept until they are read.
    """
    if not path.exists():
        raise DataError(f"There is nothing at {shown(str(path))}.")
    if path.is_dir():
        files = _folder_files(path, limits)
    elif path.name.endswith(TAR_SUFFIXES):
        files = tar_files(path, limits, wanted)
    else:
        files = _zip_files(path, limits)
    return (file for file in _counted(path, files, limits) if wanted(file[0]))


def _counted(path: Path, files: Iterator[File], limits: Limits) -> Iterator[File]:
    for number, file in enumerate(files, start=1):
        if number > limits.files:
            raise too_much(path, limits)
        yield file


def files_below(folder: Path) -> Iterator[Path]:
    """The files in a folder and in those below it, links followed. Raises DataError or StoreError if one can't be listed.

    But for folders that hold no images: hidden ones, and the one for what a repair of the disk finds.
    """

    def fail(error: OSError) -> None:  # else its images would be missing, and nobody would know
        below = Path(error.filename).relative_to(folder).parts
        if any(name.startswith(".") or name == LOST_AND_FOUND for name in below) and not passes(error):
            return
        raise unreadable(shown(str(error.filename)), error) from error

    seen = set()
    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(directory))
        folders[:] = [
            name for name in folders if os.path.realpath(Path(directory, name)) not in seen
        ]  # links that lead back
        yield from (Path(directory, name) for name in names)


def _folder_files(folder: Path, limits: Limits) -> Iterator[File]:
    for file in files_below(folder):
        # The folder itself may be the top one (`…/2750`): its own name is part of the layout.
        yield (
            PurePosixPath(folder.name, *file.relative_to(folder).parts),
            partial(read_file, file, limits.file_bytes),
        )


def _zip_files(path: Path, limits: Limits) -> Iterator[File]:
    with archive_errors(path, "zip"):
        archive = _open_zip(path, limits)
    for member in archive.infolist():
        if not member.is_dir():
            yield name_in_zip(member.filename), partial(_read_member, path, archive, member, limits)


def name_in_zip(name: str) -> PurePosixPath:
    """Where a zip's member lies: some programs of Windows write `\\` between folders."""
    return PurePosixPath(name.replace("\\", "/"))


def _open_zip(path: Path, limits: Limits) -> zipfile.ZipFile:
    """Open an archive and look at all its names before anything is unpacked."""
    if not path.is_file():
        raise DataError(f"{path} is neither a folder nor a file.")
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile does it, which then reads that many bytes
    if end and end[zipfile._ECD_SIZE] > limits.directory_bytes:  # type: ignore[attr-defined]
        raise too_much(path, limits)
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():
        name = check_member(path, member.filename)
        if member.compress_type not in COMPRESSIONS:
            raise DataError(f"{path}: '{shown(name)}' is packed in a way that is not read. Pack it as plain zip.")
    return archive


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, limits: Limits) -> bytes:
    with archive_errors(path, "zip"), archive.open(member) as file:
        return read_at_most(file, limits.file_bytes, f"{path}: '{shown(member.filename)}'")
