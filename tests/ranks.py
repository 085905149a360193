"""Ranks for tests that are about numbers: forked from one process that has imported everything, in place of started anew.

What is real: the job's main, its environment, its log, its session, and how the launcher watches and ends it. What is left
out is Python's start and five seconds of imports, a rank. The launcher's own tests, those of faults and the end-to-end tests
start ranks as the product does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from flows.launcher import LOG

PRELOADED = ["tests.preloaded"]


class ForkedRank:
    """What the launcher needs of a `subprocess.Popen`."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid: int = process.pid
        with suppress(ProcessLookupError):  # it has ended already
            while process.is_alive() and os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)  # until it has a session of its own, which the launcher signals

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode


def fork_rank(module: str, folder: Path, log: int, env: dict[str, str]) -> ForkedRank:
    """In place of `flows.launcher._start`."""
    return fork(module, folder, folder / LOG, env)


def fork(module: str, folder: Path, log: Path, env: dict[str, str]) -> ForkedRank:
    """`python -m MODULE FOLDER`, in a session of its own, without Python's start and what is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # The log by its name: where ranks are forked from, this process's files are not open.
    process = context.Process(target=_be_rank, args=(module, str(folder), str(log), env))
    process.start()
    return ForkedRank(process)


def _be_rank(module: str, folder: str, log: str, env: dict[str, str]) -> None:
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [module, folder]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
