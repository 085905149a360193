"""The files of a folder, a zip or a tar, without trusting any of it: limits hold on what is read, not on what is declared."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, Self

from diffusion.errors import DataError, UserError
from diffusion.trust.reading import passes, read_at_most, read_file, unreadable
from diffusion.trust.redaction import shown

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Others may ask for gigabytes of memory for a few bytes."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LZMA_BEGINNINGS = (b"\xfd7zXZ\0", b"\x5d\0\0")
GZIP_BEGINNING, BZIP2_BEGINNING = b"\x1f\x8b", re.compile(rb"BZh[1-9]1A")
LZMA_BYTES = 256 << 20
"""Of memory: a few bytes could ask for gigabytes. `xz -9` needs 65 MiB."""

LOST_AND_FOUND = "lost+found"
HEADER_BYTES = 1 << 20
"""Of what a tar says of a member in members of its own, such as a long name: `tarfile` reads those whole."""
LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)

PASSED_OVER = re.compile(r"__[^/]*__($|/)")
"""What `webdataset` takes for no part of a sample."""

File = tuple[PurePosixPath, Callable[[], bytes]]
"""Where a file lies, and how its content is read."""


@dataclass(frozen=True)
class Limits:
    """How much a source can have. What has more is not read to its end."""

    files: int = 20_000_000
    file_bytes: int = 256 << 20
    total_bytes: int = 4 << 40
    directory_bytes: int = 2 << 30
    """Of a zip's own list of its files, which is read before anything else can be looked at."""
    what: str = "This is more than can be trained on."


def read_files(
    path: Path, limits: Limits = Limits(), wanted: Callable[[PurePosixPath], bool] = lambda name: True
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
        files = _tar_files(path, limits, wanted)
    else:
        files = _zip_files(path, limits)
    return (file for file in _counted(path, files, limits) if wanted(file[0]))


class Spool:
    """Contents of a source that can be read in its own order alone, kept in a nameless file until the last reader is gone."""

    def __init__(self) -> None:
        self._file, self._lock, self._end = tempfile.TemporaryFile(), Lock(), 0  # noqa: SIM115  # closed with the spool

    def keep(self, content: bytes) -> Callable[[], bytes]:
        """How this content is read again. Raises DataError if the disk is full."""
        start = self._end
        try:
            with self._lock:
                self._file.seek(start)
                self._file.write(content)
        except OSError as error:
            raise DataError(f"The images can't be kept in {tempfile.gettempdir()}: {error.strerror}.") from error
        self._end += len(content)
        return partial(self._read, start, len(content))

    def _read(self, start: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(start)
            return self._file.read(size)


def check_member(path: Path, name: str) -> str:
    """A member's name, if it is one and stays within its archive. Raises DataError if not."""
    if not name:
        raise DataError(f"{path} has a member without a name. Pack it again.")
    if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise DataError(f"{path} has a member that points outside its folder: '{shown(name)}'. Do not trust it.")
    return name


class Meter:
    """Counts what was read of a source. Raises DataError beyond its limits."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits, self._total = path, limits, 0

    def count(self, content: bytes) -> bytes:
        """The content of one more file, as it is."""
        if len(content) > self._limits.file_bytes:
            raise DataError(
                f"{self._path} holds a file of more than {self._limits.file_bytes:,} bytes. {self._limits.what}"
            )
        self._total += len(content)
        if self._total > self._limits.total_bytes:
            raise too_much(self._path, self._limits)
        return content


def _counted(path: Path, files: Iterator[File], limits: Limits) -> Iterator[File]:
    for number, file in enumerate(files, start=1):
        if number > limits.files:
            raise too_much(path, limits)
        yield file


def too_much(path: Path, limits: Limits) -> DataError:
    """The error for a source that is larger than it can be."""
    return DataError(f"{path} holds more than {limits.files:,} files or {limits.total_bytes:,} bytes. {limits.what}")


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
    with _archive_errors(path, "zip"):
        archive = _open_zip(path, limits)
    for member in archive.infolist():
        if not member.is_dir():
            yield name_in_zip(member.filename), partial(_read_member, path, archive, member, limits)


def name_in_zip(name: str) -> PurePosixPath:
    """Where a zip's member lies: some programs of Windows write `\\` between folders."""
    return PurePosixPath(name.replace("\\", "/"))


class WholeHeader(tarfile.TarInfo):
    """A member's header that must be whole: `tarfile` takes half a one, or none, for the end of an archive that was cut off.

    And a short one: what `tarfile` reads to understand it may be packed a thousandfold.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the block of zeros that ends an archive
                raise
            raise ValueError("it does not end as a tar does") from error
        if header.type in LONG_HEADERS and header.size > HEADER_BYTES:
            raise ValueError(f"a name in it has more than {HEADER_BYTES:,} bytes")
        return header

    def _proc_pax(self, archive: tarfile.TarFile) -> Self:
        # Some are of all members that follow, and kept.
        if self.size + sum(map(len, archive.pax_headers.values())) > HEADER_BYTES:
            raise ValueError(f"what it says of all its members has more than {HEADER_BYTES:,} bytes")
        return super()._proc_pax(archive)  # type: ignore[misc]

    def _refuse(self, *_: object) -> Self:
        raise ValueError("it holds a file with holes (sparse): pack it without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def check_tar(path: Path, limits: Limits) -> None:
    """Go through a tar of samples to its end. Raises an error if it was cut off, or a sample's files together are too large.

    A sample is what `webdataset` takes for one, which passes over other members.
    """
    from webdataset.tariterators import base_plus_ext, meta_prefix, meta_suffix

    sample, size = None, 0
    with _open_tar(path) as archive:
        for member in _members(archive, path, limits):
            name = member.name
            if not member.isreg():
                continue
            key = base_plus_ext(name)[0]
            if member.size > limits.file_bytes:
                raise too_much(path, limits)
            about = "/" not in name and name.startswith(meta_prefix) and name.endswith(meta_suffix)
            if key is None or about or PASSED_OVER.match(name):
                continue
            sample, size = key, member.size + (size if key == sample else 0)
            if size > limits.file_bytes:
                raise too_much(path, limits)


class _Lzma:
    """An .xz or .lzma file, read with little memory: `tarfile` by itself lets the file say how much it takes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decoder = file, self._begin()

    @staticmethod
    def _begin() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(memlimit=LZMA_BYTES)

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end."""
        while True:
            packed = b""
            if self._decoder.eof:
                packed = self._decoder.unused_data.lstrip(b"\0") or self._file.read(1 << 16).lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = self._begin()  # as `xz` does with several one after the other
            elif self._decoder.needs_input:
                packed = self._file.read(1 << 16)
                if not packed:
                    raise EOFError("it is cut off")
            if content := self._decoder.decompress(packed, size):
                return content


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    # In one pass: a compressed one has no order but its own.
    with unpacked(path) as stream, tarfile.open(tarinfo=WholeHeader, mode="r|", fileobj=stream) as archive:
        yield archive


@contextmanager
def unpacked(path: Path) -> Iterator[Any]:
    """What a tar's file holds, to be read in one go. `tarfile` by itself reads only the first of several packed parts."""
    with path.open("rb") as file:
        beginning = file.read(6)
        file.seek(0)
        if beginning.startswith(LZMA_BEGINNINGS):
            yield _Lzma(file)
        elif beginning.startswith(GZIP_BEGINNING):
            yield gzip.GzipFile(fileobj=file)
        else:
            yield bz2.BZ2File(file) if BZIP2_BEGINNING.match(beginning) else file


def _members(archive: tarfile.TarFile, path: Path, limits: Limits) -> Iterator[tarfile.TarInfo]:
    number = 0
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        number += 1
        if number > limits.files:
            raise too_much(path, limits)
        yield member


def _tar_files(path: Path, limits: Limits, wanted: Callable[[PurePosixPath], bool]) -> Iterator[File]:
    spool, meter = Spool(), Meter(path, limits)
    kept: dict[str, Callable[[], bytes]] = {}
    with _archive_errors(path, "tar"), _open_tar(path) as archive:
        for member in _members(archive, path, limits):
            links = member.issym() or member.islnk()
            if not (member.isfile() or links) or not wanted(PurePosixPath(name := check_member(path, member.name))):
                continue
            if links:  # a file that was there twice is packed once
                read = kept.get(member.linkname) if member.islnk() else None
                if read is None:
                    raise DataError(
                        f"{path}: '{shown(name)}' is a link to '{shown(member.linkname)}'. Pack the files themselves: "
                        "tar --dereference --hard-dereference."
                    )
                meter.count(read())
            else:
                stream = archive.extractfile(member)
                assert stream is not None
                content = read_at_most(stream, limits.file_bytes, f"{path}: '{shown(name)}'")
                if len(content) != member.size:
                    raise ValueError(f"{shown(name)} is cut off")
                read = spool.keep(meter.count(content))
            kept[name] = read
            yield PurePosixPath(name), read


@contextmanager
def _archive_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever is made of a damaged or hostile archive into a DataError: the libraries let a dozen kinds of errors through."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        told = f"is not a whole {kind} archive ({type(error).__name__}: {error})."
        raise damaged(path, f"{told} It was probably cut off while it was copied: get it again.", error) from error


def damaged(path: Path, told: str, error: Exception) -> UserError:
    """The error for a file that can't be used: that it `told` so, or that its disk did not answer, after which it is tried again."""
    passing = isinstance(error, OSError) and passes(error)
    return unreadable(str(path), error) if passing else DataError(f"{path} {told}")  # type: ignore[arg-type]


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
    with _archive_errors(path, "zip"), archive.open(member) as file:
        return read_at_most(file, limits.file_bytes, f"{path}: '{shown(member.filename)}'")
