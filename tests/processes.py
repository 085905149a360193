"""Looking at processes that may end at any moment, and waiting until they have."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil


def wait_until_ended(processes: list[psutil.Process], deadline: float) -> list[psutil.Process]:
    """Wait for processes that are no children of this one; returns those that still run at the deadline.

    A zombie has ended: who reaps it, and when, is not ours to say.
    """

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        except psutil.NoSuchProcess:
            return False

    while (running := [process for process in processes if runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return running


def listens_at(process: psutil.Process) -> set[tuple[str, int]]:
    """Addresses that a process listens at; none if it has ended."""
    try:
        return {(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    except psutil.NoSuchProcess:
        return set()


def family(root: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started; nothing if it has ended."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_all(processes: list[psutil.Process], number: int) -> None:
    """Send a signal to those that still run."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
