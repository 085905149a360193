"""What all jobs share: their files, their processes, and how their errors travel.

A job is a module with a `JOB`: the type of its spec, and its body. It runs as one process or several, its ranks. As a program a
rank has one argument: the folder that holds the spec, `job.json`. What it has to say goes there: `error.json` if it fails. The
ranks meet in a file of that folder, which is private: nobody else can join them, and none of them listens for strangers while
they find each other. On a cluster (flows/engines) the same bodies run in processes that the cluster starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO, TypeVar

from pydantic import BaseModel, ConfigDict

from diffusion import errors
from diffusion.evaluation.names import ExtractorName
from diffusion.recipe import Evaluation, Recipe
from diffusion.settings import InceptionSource
from diffusion.trust.identifiers import RunName, Sha256
from diffusion.trust.private import UNSUPPORTED, name_anew, say_once
from diffusion.trust.redaction import fit_to_leave, redact_logs

if TYPE_CHECKING:
    from accelerate import Accelerator

SPEC, ERROR, LOCK = "job.json", "error.json", "lock"
RENDEZVOUS = "rendezvous"
"""Beginning of the name of the file where the ranks of one start meet; the variable RENDEZVOUS of a rank has the whole name.
Ranks of an earlier start may not have ended yet."""
LOCK_SECONDS = 25.0
STOP_SECONDS = 12
"""That a rank which was asked to end may take to leave a checkpoint."""
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded before any fork: a child of a threaded process must not take locks


class JobSpec(BaseModel):
    """What every job is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunName
    """Name of the run, part of every path."""
    store: str
    """URI of the store."""
    dataset: Sha256
    """Digest of the dataset."""
    shard_copies: Path
    """Folder for local copies of a remote store's shards."""
    deterministic: bool = False
    """Whether GPUs use deterministic algorithms alone."""


class TrainingJob(JobSpec):
    """What the training job is told."""

    recipe: Recipe
    until: int
    """Step to train to."""
    checkpoint_every: int
    """Steps between checkpoints on the way."""
    keep: int = 2
    """Of these, the newest that are kept; those at the recipe's milestones are kept for ever."""


class ReferenceJob(JobSpec):
    """What the job that measures the real images is told."""

    image_size: int
    extractor: ExtractorName
    inception: InceptionSource | None = None


class ExtractorJob(JobSpec):
    """What the job that trains a dataset's own extractor is told."""


class EvaluationJob(JobSpec):
    """What the evaluation job is told."""

    step: int
    """Step of the checkpoint to score."""
    samples: int
    """Images to generate."""
    evaluation: Evaluation | None = None
    """How to score, where it is not as the checkpoint's recipe says."""
    name: RunName | Literal[""] = ""
    """Name of such an evaluation, part of where its results go."""
    weights: str | None = None
    """Which of the checkpoint's weights; None: of several moving averages the one with the lowest FID."""
    inception: InceptionSource | None = None


S = TypeVar("S", bound=JobSpec)


@dataclass(frozen=True)
class Rank:
    """What the body of a job is given of the process that it runs in, whoever has started that."""

    accelerator: Accelerator
    folder: Path
    """Of the job where all ranks are on one machine, else of this one: what has to last goes to the store."""
    listen: Callable[[], Callable[[], bool]]
    """From now on a request to end does not end the process at once: what this returns says whether there was one."""


def run_job(spec_type: type[S], body: Callable[[S, Rank], None]) -> None:
    """The `main` of a rank: read the job's spec, join the other ranks, run `body(spec, rank)`.

    An error is written to `error.json` as {"kind", "message", "rank"}, and ends the process with code 1.
    """
    parent = os.getppid()
    end_with_parent()
    if os.getppid() != parent:  # it died before the kernel had been asked
        raise SystemExit(1)
    import torch

    os.umask(0o077)
    redact_logs()
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout = sys.stderr = RankOutput(f"[rank {rank}] ", sys.stdout)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it would say of each setting where it found it
    try:
        spec = spec_type.model_validate_json((folder / SPEC).read_bytes())
        if spec.deterministic:
            use_deterministic_algorithms()
        _join(folder, rank, int(os.environ.get("WORLD_SIZE", "1")))
        accelerator = make_accelerator()
        lock = lock_folder(folder) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()  # nobody looks at what an earlier writer may still be changing
        body(spec, Rank(accelerator, folder, listen_to_sigterm))
        if lock is not None:
            lock.close()
        accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Exception as error:
        report = report_of(error, rank)
        # All ranks may fail at once, most of them only because the first did: the first to write is kept.
        part = folder / f"{ERROR}.{rank}"
        part.write_text(json.dumps(report))
        try:
            name_anew(part, folder / ERROR)
        except FileExistsError:
            logging.getLogger(__name__).info("another rank has already reported an error")
        part.unlink(missing_ok=True)
        logging.getLogger(__name__).exception("rank %d failed", rank)
        raise SystemExit(1) from error


def make_accelerator() -> Accelerator:
    """The accelerator of a rank that has met the others."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # DistributedDataParallel sorts its buckets anew after the first step, unless it must look for unused parameters:
    # a resumed run, whose first step is another, would add gradients in another order than one that was not stopped.
    same_buckets = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[same_buckets])


def use_deterministic_algorithms() -> None:
    """On GPUs; before anything is computed."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for, before its first call
    torch.use_deterministic_algorithms(True)


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


def report_of(error: Exception, rank: int) -> dict[str, Any]:
    """What a rank leaves of the error that ended it: {"kind", "message", "rank"}."""
    kind = type(error).__name__ if isinstance(error, errors.UserError) else "crash"
    message = str(error) if kind != "crash" else fit_to_leave("".join(traceback.format_exception(error)))
    return {"kind": kind, "message": message, "rank": rank}


def _join(folder: Path, rank: int, ranks: int) -> None:
    """Meet the other ranks, before Accelerate would: it would have rank 0 listen on a port of its own, for everybody."""
    import torch
    import torch.distributed as dist

    if ranks > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.FileStore(str(folder / os.environ["RENDEZVOUS"]), ranks)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)


class RankOutput(io.TextIOBase):
    """Writes whole lines, each with a prefix and fit to leave: several ranks share one log."""

    def __init__(self, prefix: str, output: TextIO) -> None:
        self._prefix, self._output, self._line = prefix, output, ""

    def write(self, text: str) -> int:
        """Keep the text until its line is whole."""
        *whole, self._line = (self._line + text).split("\n")
        if whole:
            with contextlib.suppress(OSError):  # a full disk: what is said there is not worth the job
                self._output.write("".join(f"{self._prefix}{fit_to_leave(line)}\n" for line in whole))
                self._output.flush()
        return len(text)


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


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, even by `kill -9`. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def error_of(folder: Path) -> Exception | None:
    """The error that a job left in its folder, as the exception that it was; None if it left none."""
    path = folder / ERROR
    if not path.exists():
        return None
    return error_from(json.loads(path.read_text()))


def error_from(report: dict[str, Any]) -> Exception:
    """The error that a rank has reported, as the exception that it was."""
    kind = getattr(errors, report["kind"], None)
    if isinstance(kind, type) and issubclass(kind, errors.UserError):
        return kind(report["message"])
    return RuntimeError(f"rank {report['rank']} failed:\n{report['message']}")


class ProgressFile:
    """What a job has done so far, in its folder's `progress.json`, for whoever watches it from outside."""

    NAME = "progress.json"
    SECONDS = 0.5

    def __init__(self, folder: Path, active: bool) -> None:
        self._path, self._active, self._written = folder / self.NAME, active, 0.0

    def write(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say where the job is; at most twice a second, but never missing the end of a stage."""
        now = time.monotonic()
        if self._active and (done == total or now - self._written >= self.SECONDS):
            self._written = now
            part = self._path.with_suffix(".part")
            with contextlib.suppress(OSError):  # a full disk: neither is this
                part.write_text(json.dumps({"stage": stage, "done": done, "total": total, "note": note}))
                part.replace(self._path)
