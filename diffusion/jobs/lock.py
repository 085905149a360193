"""One writer of a folder at a time."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from diffusion import errors
from diffusion.trust.private import UNSUPPORTED, say_once

LOCK = "lock"
LOCK_SECONDS = 25.0


def lock_folder(folder: Path, seconds: float = LOCK_SECONDS) -> IO[bytes]:
    """Make this process the only writer of a folder, until the file that is returned is closed or the process ends.

    Waits for one that is about to end. Raises RunBusy after `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+b")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                say_once(folder, "knows no locks: see to it that no two runs write into it")
                return file
            if not isinstance(error, BlockingIOError):
                raise
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            file.seek(0)
            owner = file.read().decode() or "?"
            file.close()
            raise errors.RunBusy(
                f"Process {owner} on this machine is writing {folder}. Wait for it to end, or end it."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        return file
