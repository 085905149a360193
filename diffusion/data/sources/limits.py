"""What sources have in common that are not trusted: limits on what is read, names that stay within, and errors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Lock

from diffusion.errors import DataError, UserError
from diffusion.trust.reading import passes, unreadable
from diffusion.trust.redaction import shown

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


USUAL = Limits()


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


def too_much(path: Path, limits: Limits) -> DataError:
    """The error for a source that is larger than it can be."""
    return DataError(f"{path} holds more than {limits.files:,} files or {limits.total_bytes:,} bytes. {limits.what}")


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


@contextmanager
def archive_errors(path: Path, kind: str) -> Iterator[None]:
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
