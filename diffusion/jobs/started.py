"""When a process began, told so that no other one is taken for it; and who began this one."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

SAME_SECONDS = 0.5


def started(pid: int) -> float:
    """Seconds from the machine's start to the process's. Raises psutil.NoSuchProcess.

    psutil's own time of creation is counted from the clock: whoever sets that moves it.
    """
    stat = Path(f"/proc/{pid}/stat")
    try:
        return int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]) / os.sysconf(
            "SC_CLK_TCK"
        )
    except ProcessLookupError:
        raise psutil.NoSuchProcess(pid) from None
    except FileNotFoundError:  # it has ended; or this is no Linux
        return psutil.Process(pid).create_time() - psutil.boot_time()


def is_same(pid: int, noted: float) -> bool:
    """Whether the process of that pid is the one of which this was noted. Raises psutil.NoSuchProcess."""
    # Earlier versions noted the time of creation.
    return abs(started(pid) - noted) < SAME_SECONDS or abs(psutil.Process(pid).create_time() - noted) < 5


def ancestors() -> list[int]:
    """The process that started this one, the one that started that, and so on."""
    return [process.pid for process in psutil.Process().parents()]
