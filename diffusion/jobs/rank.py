"""The process that a rank is: how it meets the others, and runs the body of its job."""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from diffusion.jobs.lock import lock_folder
from diffusion.jobs.reports import ERROR, RankOutput, report_of
from diffusion.jobs.specs import SPEC, JobSpec
from diffusion.jobs.stopping import end_with_parent, listen_to_sigterm
from diffusion.trust.private import name_anew
from diffusion.trust.redaction import redact_logs

if TYPE_CHECKING:
    from accelerate import Accelerator

RENDEZVOUS = "rendezvous"
"""Beginning of the name of the file where the ranks of one start meet; the variable RENDEZVOUS of a rank has the whole name.
Ranks of an earlier start may not have ended yet."""
DEVICE = "RANK_DEVICE"
"""The variable that says what a rank is started for: cuda or cpu."""
LINK_SECONDS = 1800
"""That ranks wait for one another: the first may have much to do alone. Those that have died are found otherwise, far earlier."""
S = TypeVar("S", bound=JobSpec)


@dataclass(frozen=True)
class Rank:
    """What the body of a job is given of the process that it runs in, whoever has started that."""

    accelerator: Accelerator
    folder: Path
    """Of the job where all ranks are on one machine, else of this one: what has to last goes to the store."""
    listen: Callable[[], Callable[[], bool]]
    """From now on a request to end does not end the process at once: what this returns says whether there was one."""


def rank_main(spec_type: type[S], body: Callable[[S, Rank], None]) -> None:
    """The `main` of a rank: read the job's spec, join the other ranks, run `body(spec, rank)`.

    An error is written to `error.json` as {"kind", "message", "rank"}, and ends the process with code 1.
    """
    # As it ends, Python would look through all that was ever imported, for a second, to free it.
    atexit.register(gc.freeze)
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
        keep_compiled(spec.compiled)
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
        part.write_text(json.dumps(report), encoding="utf-8")
        try:
            name_anew(part, folder / ERROR)
        except FileExistsError:
            logging.getLogger(__name__).info("another rank has already reported an error")
        part.unlink(missing_ok=True)
        logging.getLogger(__name__).exception("rank %d failed", rank)
        raise SystemExit(1) from error


def on_gpu() -> bool:
    """Whether this rank computes on a GPU. Raises RuntimeError if it was started for one, and there is none."""
    import torch

    wanted, there = os.environ.get(DEVICE), torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise RuntimeError(
            "The GPU that this job was started for can't be used any more: nvidia-smi and dmesg may say why."
        )
    return there and wanted != "cpu"


def make_accelerator() -> Accelerator:
    """The accelerator of a rank that has met the others."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    # DistributedDataParallel sorts its buckets anew after the first step, unless it must look for unused parameters:
    # a resumed run, whose first step is another, would add gradients in another order than one that was not stopped.
    same_buckets = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(cpu=not on_gpu(), kwargs_handlers=[same_buckets])


def keep_compiled(folder: Path) -> None:
    """Have torch keep what it compiles in a private folder, unless the environment names another.

    By default that is a folder in /tmp whose name everybody knows, and torch runs what it finds there, whoever made it.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def use_deterministic_algorithms() -> None:
    """On GPUs; before anything is computed."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what cuBLAS asks for, before its first call
    torch.use_deterministic_algorithms(True)


def _join(folder: Path, rank: int, ranks: int) -> None:
    """Meet the other ranks, before Accelerate would: it would have rank 0 listen on a port of its own, for everybody."""
    import torch.distributed as dist

    if ranks > 1:
        backend = "nccl" if on_gpu() else "gloo"
        store = dist.FileStore(str(folder / os.environ["RENDEZVOUS"]), ranks)
        waits = timedelta(seconds=LINK_SECONDS)  # NCCL's own ten minutes are too few
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=waits)
