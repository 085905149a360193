"""How many cores this process may compute on, and with how many threads and what memory its children do."""

from __future__ import annotations

import os
from pathlib import Path

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TUNABLES = "GLIBC_TUNABLES"
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"mmap_threshold": 32 * 2**20, "trim_threshold": 2**30, "hugetlb": 1}.items()
)
"""Tensors of one size come and go at each step. The C library would give their memory back each time, and the kernel would fill it
with zeros, page by page, for the next ones: a tenth of a training step's time, a sixth of sampling's. 32 MiB is the most that it
takes for a threshold, so larger tensors gain nothing; up to a GiB that is free stays with the process."""


def usable_cores() -> int:
    """The cores that this process may use: those that it is bound to, and no more than its container or unit has the time of."""
    return min(bound_cores(), granted_cores(CGROUPS, OWN_CGROUP) or bound_cores())


def bound_cores() -> int:
    """The cores that this process may run on, however much of their time it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def granted_cores(cgroups: Path, own: Path) -> int | None:
    """The whole cores that control groups (version 2) grant this process the time of, one at least; None: no limit is known.

    Args:
        cgroups: where their file system is.
        own: the file that names this process's group.
    """
    try:
        named = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = [Path(line.removeprefix("0::/")) for line in named if line.startswith("0::/")]
    limits = []
    for group in {parent for path in paths for parent in (path, *path.parents)}:
        try:
            quota, period = (cgroups / group / "cpu.max").read_text(encoding="utf-8").split()
        except (OSError, ValueError):  # the root has none
            continue
        if quota != "max":
            limits.append(max(1, int(quota) // int(period)))
    return min(limits, default=None)


def computing_variables(threads: int) -> dict[str, str]:
    """What says to a process, before it starts, with how many threads it computes, and what memory it keeps."""
    told = os.environ.get(TUNABLES, "")
    # Of two values of one name the later holds, which is the user's. Of the threads torch asks MKL's first.
    memory = told if told.startswith(KEEP_MEMORY) else ":".join(filter(None, (KEEP_MEMORY, told)))
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), TUNABLES: memory}
