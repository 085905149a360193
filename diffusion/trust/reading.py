"""Reading what somebody else has written: so much and no more, whatever it says of its own size."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, Protocol

from diffusion.errors import DataError, StoreError, UserError
from diffusion.trust.redaction import shown

PASSING = frozenset(
    {
        errno.EIO,
        errno.EINTR,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,
        errno.EMFILE,
        errno.ENFILE,
    }
)
"""Errors of a disk elsewhere, or of a busy machine, after which the same file may be read in a while."""


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, amount: int, /) -> bytes:
        """The next bytes, at most so many; none at its end."""
        ...


def read_at_most(file: Readable, limit: int, what: str) -> bytes:
    """All that is left of a stream. Raises DataError, which names `what`, if that is more than `limit` bytes."""
    parts, left = [], limit + 1
    while left > 0 and (part := file.read(min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise DataError(f"{what} has more than {limit:,} bytes. It is not what it should be, and was not read.")
    return b"".join(parts)


def passes(error: OSError) -> bool:
    """Whether what could not be read may be had later."""
    return error.errno in PASSING


def unreadable(what: str, error: OSError) -> UserError:
    """The error for what can't be read: a StoreError, after which it is tried again, if it may be had later; else a DataError."""
    return (StoreError if passes(error) else DataError)(f"{what} can't be read: {error.strerror}.")


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises DataError for pipes, devices and whatever else could wait or never end.

    Raises StoreError if the disk that it lies on does not answer.
    """
    what = shown(str(path))
    try:
        # Without waiting for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{what} is not a file with content: it was not read.")
            return read_at_most(file, limit, what)
    except OSError as error:
        raise unreadable(what, error) from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"{what} can't be read: {error}.") from error


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says. Raises ValueError, and nothing else, if it is none, or nested too deeply to be one of ours."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
