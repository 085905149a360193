"""Start a job under torchrun, watch it, and leave nothing of it behind.

The job gets a session of its own, so that its whole tree is one group to signal; it is told to end when this process
dies; and it writes to a file, so that nobody waits for the end of a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from diffusion.job import ERROR, SPEC, JobSpec, ProgressFile, end_with_parent, error_of

POLL_SECONDS = 0.2
KILL_SECONDS = 5.0
GRACE_SECONDS = 13.0  # a rank gives up by itself after 12; Prefect kills the flow 30 s after it asked it to end
LOG = "output.log"
TAIL_LINES = 30


def run_job(
    module: str,
    spec: JobSpec,
    folder: Path,
    processes: int,
    on_progress: Callable[[dict[str, Any]], None],
    on_line: Callable[[str], None],
    threads: int | None = None,
) -> None:
    """Run `module` on `processes` processes until it ends; raise the error that it left if it failed.

    Each process computes with `threads` threads, by default its share of the machine's cores. The sums inside an
    operation are cut by threads: the same bits need the same number.

    Whatever ends this call early (a cancellation, a crash) ends the job's whole tree first: SIGTERM, on which the
    training leaves a checkpoint, then SIGKILL.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (ERROR, ProgressFile.NAME):
        (folder / name).unlink(missing_ok=True)
    (folder / SPEC).write_text(spec.model_dump_json(indent=1))
    threads = threads or max(1, usable_cores() // processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command += ["-m", module, str(folder)]
    with (folder / LOG).open("w") as log, (folder / LOG).open() as output:
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
        )
        tree: dict[int, psutil.Process] = {}
        try:
            while job.poll() is None:
                if len(tree) < processes:
                    _remember(job, tree)
                _forward(output, on_line)
                _report(folder, on_progress)
                time.sleep(POLL_SECONDS)
            _forward(output, on_line)
            _report(folder, on_progress)
        finally:
            _end(job, list(tree.values()))
    if job.returncode != 0:
        tail = "\n".join((folder / LOG).read_text().splitlines()[-TAIL_LINES:])
        raise error_of(folder) or RuntimeError(f"{module} ended with code {job.returncode}:\n{tail}")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _remember(job: subprocess.Popen[bytes], tree: dict[int, psutil.Process]) -> None:
    """Note the job's processes while their parents live: afterwards nothing says whose they were."""
    with contextlib.suppress(psutil.NoSuchProcess):
        tree |= {process.pid: process for process in psutil.Process(job.pid).children(recursive=True)}


def _end(job: subprocess.Popen[bytes], tree: list[psutil.Process]) -> None:
    """End the job's whole tree: the agent, and the ranks, which torchrun gives sessions of their own."""
    deadline = time.monotonic() + GRACE_SECONDS
    # A second request must not interrupt what the first one began.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if _in_main_thread() else None
    try:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(GRACE_SECONDS)
        for process in wait_until_ended(tree, deadline):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        # A killed process may run for a moment more: a retry must not begin while it can still write.
        wait_until_ended(tree, time.monotonic() + KILL_SECONDS)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


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


def _forward(output: Any, on_line: Callable[[str], None]) -> None:
    for line in output.read().splitlines():
        if line.strip():
            on_line(line)


def _report(folder: Path, on_progress: Callable[[dict[str, Any]], None]) -> None:
    path = folder / ProgressFile.NAME
    if path.exists():
        on_progress(json.loads(path.read_text()))
