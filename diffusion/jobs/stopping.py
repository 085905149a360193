"""How a rank ends: with its parent, and in time when it is asked to."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

STOP_SECONDS = 12
"""That a rank which was asked to end may take to leave a checkpoint."""
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork: a child of a threaded process must not take locks


class StopRequest:
    """Whether this process was asked to end: SIGTERM does it, and ends the process STOP_SECONDS later.

    When a parent is killed its threads end one after the other, and the kernel sends SIGTERM for each. So the handler takes no
    lock, which the next signal would wait for within it, for ever. Python calls the handler only between two operations, and one
    may take minutes, the backward pass of a large network: the time is taken by a thread, which hears of the signal at once.
    """

    def __init__(self) -> None:
        self._made = False
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=_end_in_time, args=(heard,), name="end in time", daemon=True).start()
        self.take_signal()

    def take_signal(self) -> None:
        """Be who hears of SIGTERM, also after a library has put a handler of its own in the place."""
        signal.signal(signal.SIGTERM, self._make)

    def _make(self, *_: object) -> None:
        self._made = True

    def is_made(self) -> bool:
        """Whether it was."""
        return self._made


def _end_in_time(heard: int) -> None:
    """End the process some time after its first SIGTERM: a checkpoint that takes longer is not waited for."""
    while signal.SIGTERM not in os.read(heard, 64):
        pass
    signal.alarm(STOP_SECONDS)


def listen_to_sigterm() -> Callable[[], bool]:
    """Have SIGTERM no longer end this process at once; returns what says whether it came."""
    return StopRequest().is_made


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, even by `kill -9`. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
