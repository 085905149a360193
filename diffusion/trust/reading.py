"""Reading what somebody else has written: so much and no more, whatever it says of its own size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Protocol

from diffusion.errors import DataError
from diffusion.trust.redaction import shown


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


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises DataError for pipes, devices and whatever else could wait or never end."""
    what = shown(str(path))
    try:
        # Without waiting for a writer, should it be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"{what} is not a file with content: it was not read.")
            return read_at_most(file, limit, what)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{what} can't be read: {reason}.") from error


def parse_json(data: bytes | str) -> Any:
    """What a JSON text says. Raises ValueError, and nothing else, if it is none, or nested too deeply to be one of ours."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
