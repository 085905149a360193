"""What a user asks for: the flow's parameters, and what they mean on this machine."""

from __future__ import annotations

import re
from glob import glob
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion.data.sources.find import EUROSAT
from diffusion.data.sources.source import SourceOptions, parse_options
from diffusion.errors import ClusterError, RecipeError
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.trust.redaction import shown
from flows.engines.placement import Placement, Workers
from flows.launcher import cluster_capacity, usable_cores

PROCESSES_A_CORE = 4
"""More than one are slower than one; so many more are a slip of the keyboard."""
CHECKPOINT_EVERY_IMAGES = 250_000
CHECKPOINTS_AT_LEAST = 20  # in a run: metrics reach MLflow, and a crash loses work, by the checkpoint


RANGE = r"([0-9]{1,6})(?:-([0-9]{1,6}))?"
"""Of processes: a number, or the least and the most."""

StartFrom = Literal["scratch", "champion"]


def usual_preset() -> str:
    """Where none is asked for: the recipe for GPUs where there is one, else the one that a CPU trains in minutes."""
    there = cluster_capacity().gpus if settings().engine == "ray" else gpus()
    return "eurosat" if there else "demo"


class TrainingRequest(BaseModel):
    """The parameters of one flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    overrides: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0, lt=2**63)
    source: str = EUROSAT
    source_options: dict[str, Any] = {}
    processes: int | str | None = None
    start_from: StartFrom = "scratch"
    skip_unchanged: bool = False
    fid_margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    bits_margin: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    fid_bar: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    def recipe(self) -> Recipe:
        """The recipe that they mean. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return load_recipe(self.preset, self.overrides, self.seed)

    def options(self) -> SourceOptions:
        """How the source's images are meant. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return parse_options(self.source_options)


def usable_workers(recipe: Recipe, asked: int | str | None) -> Workers:
    """What jobs may run on: one number of processes on this machine; on a cluster all that were asked for.

    Raises RecipeError if those can't share the recipe's lanes, or are more than there are; ClusterError if there is no cluster.
    """
    if settings().engine == "ray":
        return _of_cluster(recipe, asked)
    return Workers(counts=(usable_processes(recipe, asked),), cores=usable_cores())


def usable_processes(recipe: Recipe, asked: int | str | None) -> int:
    """How many processes a job runs on here: those asked for; else one a GPU; else what the CPU's cores allow.

    Raises RecipeError if those asked for can't share the recipe's lanes, or are more than the GPUs.
    """
    present = gpus()
    room = present or usable_cores()
    if asked is None:
        return max(_sharing(recipe, 1, room))
    least, most = parse_range(asked)
    counts = _sharing(recipe, least, most)
    if present and counts[0] > present:
        raise RecipeError(
            f"{counts[0]} processes were asked for, but there are {present} GPUs. Use at most as many, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
        )
    if not present and counts[0] > PROCESSES_A_CORE * usable_cores():
        raise RecipeError(
            f"{counts[0]:,} processes were asked for, but there are {usable_cores()} cores. Use at most as many."
        )
    return max((count for count in counts if count <= room), default=counts[0])


def _of_cluster(recipe: Recipe, asked: int | str | None) -> Workers:
    least, most = (1, recipe.data.lanes) if asked is None else parse_range(asked)
    counts = _sharing(recipe, least, most)
    capacity = cluster_capacity()
    placement = Placement(module="", counts=counts, gpu=capacity.gpus > 0)
    if not placement.fitting(capacity):
        raise ClusterError(f"{placement.too_small(capacity)} Ask for fewer, or add hosts (ray start --address …).")
    return Workers(counts=counts, gpu=placement.gpu, cores=capacity.largest)


def _sharing(recipe: Recipe, least: int, most: int) -> tuple[int, ...]:
    """The counts that share the recipe's lanes evenly. Raises RecipeError if there is none."""
    if least == most:
        recipe.check_processes(least)
    counts = tuple(count for count in range(least, min(most, recipe.data.lanes) + 1) if recipe.data.lanes % count == 0)
    if not counts:
        raise RecipeError(
            f"No number of processes from {least} to {most} shares data.lanes = {recipe.data.lanes} evenly. Choose a range that "
            "holds a divisor of it."
        )
    return counts


def parse_range(asked: int | str) -> tuple[int, int]:
    """The least and the most of a number of processes or a range: 4, "2-8". Raises RecipeError."""
    found = re.fullmatch(RANGE, str(asked))
    if found is None:
        raise RecipeError(f"processes is {shown(str(asked))}: a number (4) or a range (2-8) is wanted.")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise RecipeError(f"processes is {asked}: a range rises, from 1 on.")
    return least, most


def threads_per_process(recipe: Recipe) -> int | None:
    """Threads of each process; None: its share of the cores. How an operation's sums are cut depends on them."""
    return 1 if recipe.reduction == "exact" and not gpus() else None


def checkpoint_every(recipe: Recipe) -> int:
    """Steps between checkpoints."""
    steps = (recipe.total_steps - recipe.first_step) // CHECKPOINTS_AT_LEAST
    return max(1, min(CHECKPOINT_EVERY_IMAGES // recipe.data.batch_size, steps))


def gpus() -> int:
    """How many GPUs there are."""
    # torch takes seconds to import: not where no driver shows a device (NVIDIA, AMD, WSL).
    if not any(map(glob, ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg"))):
        return 0
    import torch

    return torch.cuda.device_count()
