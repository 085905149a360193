"""Waiting for processes that are no children of the tests."""

from __future__ import annotations

import time

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
