"""Loaded by every Python that has this folder on PYTHONPATH: kills rank 0 at a chosen moment inside a checkpoint's write.

FAULT_AT counts the moments: half of a file written, its folder flushed, the file before and after it is renamed into place.
"""

import os
import pathlib
import signal
from collections.abc import Callable

FAULT_AT = int(os.environ.get("FAULT_AT", "0"))
moments = 0


def moment(what: str, damage: Callable[[], None] = lambda: None) -> None:
    """One more moment; the last one, if it is the chosen one."""
    global moments
    moments += 1
    if moments == FAULT_AT:
        damage()
        pathlib.Path(os.environ["FAULT_SAID"]).write_text(what)
        os.kill(os.getpid(), signal.SIGKILL)


if FAULT_AT and os.environ.get("RANK") == "0":
    real_replace, real_fsync = pathlib.Path.replace, os.fsync

    def replace(self: pathlib.Path, target: "os.PathLike[str]") -> pathlib.Path:
        path = pathlib.Path(target)
        watched = "checkpoints" in path.parts or path.name == "committed.json"
        if watched:
            moment(f"before {path.name} was in place")
        result = real_replace(self, target)
        if watched:
            moment(f"after {path.name} was in place")
        return result

    def fsync(descriptor: int) -> None:
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if "checkpoints" in path.parts:
            if path.is_dir():
                moment(f"before folder {path.name} was flushed")
            else:
                half = os.fstat(descriptor).st_size // 2
                moment(f"half of {'.'.join(path.name.split('.')[1:3])} written", lambda: os.ftruncate(descriptor, half))
        real_fsync(descriptor)

    pathlib.Path.replace = replace  # type: ignore[method-assign,assignment]
    os.fsync = fsync  # type: ignore[assignment]
