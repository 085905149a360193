"""Start the ranks of a job, watch them, and leave nothing of them behind.

Each rank gets a session of its own, so that it and what it starts are one group to signal; it is told to end when this
process dies; and it writes to a file, so that nobody waits for the end of a pipe. The ranks talk over the loopback
interface only.
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
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.jobs.rank import DEVICE, RENDEZVOUS
from diffusion.jobs.reports import ERROR, ProgressFile, error_of
from diffusion.jobs.specs import SPEC, JobSpec
from diffusion.jobs.stopping import end_with_parent
from flows.engines.cores import computing_variables, usable_cores
from flows.engines.gpus import gpus

POLL_SECONDS = 0.2
GRACE_SECONDS = 13.0  # a rank gives up by itself after 12; Prefect kills the flow 30 s after it asked it to end
LOG = "output.log"
TAIL_LINES = 30
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"

NOT_FOR_RANKS = (
    *("PREFECT_", "MLFLOW_", "RAY_"),  # a rank speaks to the store alone: it needs no password of a server
    *("ACCELERATE_", "MASTER_", "PMI_", "OMPI_", "MV2_"),  # what some other launcher says is not meant for it
    # Sums depend on the number of threads, and a shell's own would win over ours.
    *("OMP_THREAD_LIMIT", "OMP_DYNAMIC", "MKL_DYNAMIC", "MKL_DOMAIN_NUM_THREADS"),
)
"""Beginnings of the names of variables that ranks do not get."""


@dataclass(frozen=True)
class Listener:
    """Who is told what a job says while it runs."""

    on_progress: Callable[[dict[str, Any]], None] = lambda progress: None
    on_line: Callable[[str], None] = lambda line: None


NOBODY = Listener()


def run_job(
    module: str,
    spec: JobSpec,
    folder: Path,
    processes: int,
    listener: Listener = NOBODY,
    threads: int | None = None,
) -> None:
    """Run `module` on `processes` processes until all have ended; raise the error that they left if one failed.

    Each process computes with `threads` threads, by default its share of the machine's cores. The sums inside an
    operation are cut by threads: the same bits need the same number.

    Whatever ends this call early (a cancellation, a crash, a rank that dies) ends the job's other processes first:
    SIGTERM, on which the training leaves a checkpoint, then SIGKILL.
    """
    threads = threads or max(1, usable_cores() // processes)
    device = {DEVICE: "cuda" if gpus() else "cpu"}
    environments = [rank_environment(rank, processes, threads) | device for rank in range(processes)]
    run_ranks(module, spec, folder, environments, listener)


def run_ranks(
    module: str, spec: JobSpec, folder: Path, environments: Sequence[dict[str, str]], listener: Listener
) -> None:
    """As `run_job`, with the environment of each process."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder / ERROR, folder / ProgressFile.NAME, *folder.glob(f"{RENDEZVOUS}-*")):
        path.unlink(missing_ok=True)
    (folder / SPEC).write_text(spec.model_dump_json(indent=1), encoding="utf-8")
    meeting = f"{RENDEZVOUS}-{uuid.uuid4().hex}"
    ranks: list[subprocess.Popen[bytes]] = []
    with (
        (folder / LOG).open("w", encoding="utf-8") as log,
        (folder / LOG).open(encoding="utf-8", errors="replace") as output,
    ):
        try:
            for environment in environments:
                ranks.append(_start(module, folder, log.fileno(), environment | {"RENDEZVOUS": meeting}))
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                _forward(output, listener.on_line)
                _report(folder, listener.on_progress)
                time.sleep(POLL_SECONDS)
        finally:
            # The first of these that ended is the reason; what the others end with follows from it.
            code = next((rank.returncode for rank in ranks if rank.returncode), 0)
            _end(ranks)
            (folder / meeting).unlink(missing_ok=True)
        _forward(output, listener.on_line)
        _report(folder, listener.on_progress)
    if code != 0:
        raise error_of(folder) or RuntimeError(_last_words(module, code, folder / LOG))


def _last_words(module: str, code: int, log: Path) -> str:
    """What is known of a job that left no error."""
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])
    if code == -signal.SIGKILL:
        return f"{module} was killed: by somebody, or since the machine's memory was full (dmesg says so). Its last lines:\n{tail}"
    return f"{module} ended with code {code}:\n{tail}"


def _start(module: str, folder: Path, log: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", module, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=end_with_parent,
        env=env,
    )


def rank_environment(rank: int, processes: int, threads: int) -> dict[str, str]:
    """The environment of one rank."""
    placing = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_RANKS) and name not in placing
    }
    own = {"RANK": str(rank), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"} | computing_variables(threads)
    if processes > 1:  # a single one is no group
        own |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return inherited | own | {"GLOO_SOCKET_IFNAME": LOOPBACK, "NCCL_SOCKET_IFNAME": LOOPBACK}


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End all ranks that still run, with what they have started."""
    # A second request must not interrupt what the first one began.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if _in_main_thread() else None
    try:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, deadline - time.monotonic()))
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
        # A killed process may run for a moment more: a retry must not begin while it can still write.
        for rank in ranks:
            rank.wait()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _forward(output: Any, on_line: Callable[[str], None]) -> None:
    for line in output.read().splitlines():
        if line.strip():
            on_line(line)


def _report(folder: Path, on_progress: Callable[[dict[str, Any]], None]) -> None:
    path = folder / ProgressFile.NAME
    if path.exists():
        on_progress(json.loads(path.read_text(encoding="utf-8")))
