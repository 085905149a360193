"""What the training and the evaluation job share: their files, their processes, and how their errors travel.

A job is a module that runs as one process or several, its ranks, each with one argument: the folder that holds its
`job.json`. What it has to say goes there: `error.json` if it fails. The ranks meet in a file of that folder, which is
private: nobody else can join them, and none of them listens for strangers while they find each other.
"""

from __future__ import annotations

import ctypes
import fcntl
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TextIO, TypeVar

from pydantic import BaseModel, ConfigDict

from diffusion import errors
from diffusion.recipe import Evaluation, Recipe
from diffusion.settings import InceptionSource
from diffusion.trust.identifiers import RunName, Sha256
from diffusion.trust.redaction import fit_to_leave, redact_logs

if TYPE_CHECKING:
    from accelerate import Accelerator

SPEC, ERROR, LOCK = "job.json", "error.json", "lock"
RENDEZVOUS = "rendezvous"
"""Beginning of the name of the file where the ranks of one start meet; the variable RENDEZVOUS of a rank has the whole name.
Ranks of an earlier start may not have ended yet."""
LOCK_SECONDS = 25.0
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
    extractor: str
    inception: InceptionSource | None = None


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
    inception: InceptionSource | None = None


S = TypeVar("S", bound=JobSpec)


def run_job(spec_type: type[S], body: Callable[[S, Path, Accelerator], None]) -> None:
    """The `main` of a job: read its spec, join the other processes, run `body(spec, folder, accelerator)`.

    An error is written to `error.json` as {"kind", "message", "rank"}, and ends the process with code 1.
    """
    parent = os.getppid()
    end_with_parent()
    if os.getppid() != parent:  # it died before the kernel had been asked
        raise SystemExit(1)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    os.umask(0o077)
    redact_logs()
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("RANK", "0"))
    sys.stdout = sys.stderr = RankOutput(f"[rank {rank}] ", sys.stdout)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    try:
        spec = spec_type.model_validate_json((folder / SPEC).read_bytes())
        if spec.deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for, before its first call
            torch.use_deterministic_algorithms(True)
        # DistributedDataParallel sorts its buckets anew after the first step, unless it must look for unused parameters:
        # a resumed run, whose first step is another, would add gradients in another order than one that was not stopped.
        same_buckets = DistributedDataParallelKwargs(find_unused_parameters=True)
        _join(folder, rank, int(os.environ.get("WORLD_SIZE", "1")))
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[same_buckets])
        lock = lock_folder(folder) if accelerator.is_main_process else None
        accelerator.wait_for_everyone()  # nobody looks at what an earlier writer may still be changing
        body(spec, folder, accelerator)
        if lock is not None:
            lock.close()
        accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Exception as error:
        kind = type(error).__name__ if isinstance(error, errors.UserError) else "crash"
        report = {
            "kind": kind,
            "message": str(error) if kind != "crash" else fit_to_leave(traceback.format_exc()),
            "rank": rank,
        }
        # All ranks may fail at once, most of them only because the first did: the first to write is kept.
        part = folder / f"{ERROR}.{rank}"
        part.write_text(json.dumps(report))
        try:
            os.link(part, folder / ERROR)
        except FileExistsError:
            logging.getLogger(__name__).info("another rank has already reported an error")
        part.unlink()
        logging.getLogger(__name__).exception("rank %d failed", rank)
        raise SystemExit(1) from error


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
        except BlockingIOError:
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
    report = json.loads(path.read_text())
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
            part.write_text(json.dumps({"stage": stage, "done": done, "total": total, "note": note}))
            part.replace(self._path)
