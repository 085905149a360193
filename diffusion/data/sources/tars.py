"""Tars, read in one pass, whatever they are packed by, and without trusting what they say of themselves."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from diffusion.data.sources.limits import File, Limits, Meter, Spool, archive_errors, check_member, too_much
from diffusion.errors import DataError
from diffusion.trust.reading import read_at_most
from diffusion.trust.redaction import shown

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
LZMA_BEGINNINGS = (b"\xfd7zXZ\0", b"\x5d\0\0")
GZIP_BEGINNING, BZIP2_BEGINNING = b"\x1f\x8b", re.compile(rb"BZh[1-9]1A")
LZMA_BYTES = 256 << 20
"""Of memory: a few bytes could ask for gigabytes. `xz -9` needs 65 MiB."""
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


def tar_files(path: Path, limits: Limits, wanted: Callable[[PurePosixPath], bool]) -> Iterator[File]:
    """The files of a tar that are wanted. Raises DataError if it is damaged or unsafe, or a link leads to none of them."""
    spool, meter = Spool(), Meter(path, limits)
    kept: dict[str, Callable[[], bytes]] = {}
    with archive_errors(path, "tar"), _open_tar(path) as archive:
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
        known = sum(len(name) + len(value) for name, value in archive.pax_headers.items())
        if self.size + known > HEADER_BYTES:
            raise ValueError(f"what it says of all its members has more than {HEADER_BYTES:,} bytes")
        return super()._proc_pax(archive)  # type: ignore[misc]

    def _refuse(self, *_: object) -> Self:
        raise ValueError("it holds a file with holes (sparse): pack it without --sparse")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse
