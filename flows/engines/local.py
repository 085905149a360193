"""Jobs on this machine: their ranks are processes that the launcher starts."""

from __future__ import annotations

import platform
from pathlib import Path

from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.tracking.system import Machine
from flows.engines.cores import bound_cores, usable_cores
from flows.engines.engine import Job
from flows.engines.gpus import broken_gpu, gpus
from flows.engines.placement import Workers, parse_range, sharing
from flows.launcher import Listener, run_job

PROCESSES_A_CORE = 4
"""More than one are slower than one; so many more are a slip of the keyboard."""


class Local:
    """An `Engine`."""

    def gpus(self) -> int:
        return gpus()

    def broken_gpu(self) -> str:
        return broken_gpu()

    def workers(self, recipe: Recipe, asked: int | str | None) -> Workers:
        return Workers(counts=(usable_processes(recipe, asked),), cores=usable_cores())

    def threads(self, recipe: Recipe) -> int | None:
        return 1 if recipe.reduction == "exact" and not gpus() else None

    def run(self, job: Job, workers: Workers, threads: int | None, listener: Listener) -> None:
        run_job(job.spec.MODULE, job.spec, job.folder, workers.counts[-1], listener, threads)

    def watched(self, folder: Path) -> Machine:
        return Machine()

    def described(self, workers: Workers) -> str:
        return f"{workers.counts[-1]} {'GPU processes' if gpus() else f'CPU processes ({platform.machine()})'}"


def usable_processes(recipe: Recipe, asked: int | str | None) -> int:
    """How many processes a job runs on here: those asked for; else one a GPU; else what the CPU's cores allow.

    Raises RecipeError if those asked for can't share the recipe's lanes, or are more than the GPUs.
    """
    present = gpus()
    room = present or usable_cores()
    if asked is None:
        return max(sharing(recipe, 1, room))
    least, most = parse_range(asked)
    counts = sharing(recipe, least, most)
    if present and counts[0] > present:
        raise RecipeError(
            f"{counts[0]} processes were asked for, but there are {present} GPUs. Use at most as many, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
        )
    if not present and counts[0] > PROCESSES_A_CORE * bound_cores():
        raise RecipeError(
            f"{counts[0]:,} processes were asked for, but there are {bound_cores()} cores. Use at most as many."
        )
    return max((count for count in counts if count <= room), default=counts[0])
