"""What a user asks for: the flow's parameters, and what they mean on this machine."""

from __future__ import annotations

from glob import glob
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion.data.find import EUROSAT
from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from flows.launcher import usable_cores

PROCESSES_A_CORE = 4
"""More than one are slower than one; so many more are a slip of the keyboard."""
CHECKPOINT_EVERY_IMAGES = 250_000
CHECKPOINTS_AT_LEAST = 20  # in a run: metrics reach MLflow, and a crash loses work, by the checkpoint


StartFrom = Literal["scratch", "champion"]


class TrainingRequest(BaseModel):
    """The parameters of one flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    overrides: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0, lt=2**63)
    source: str = EUROSAT
    processes: int | None = None
    start_from: StartFrom = "scratch"
    skip_unchanged: bool = False
    fid_margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    bits_margin: float = Field(default=0.01, ge=0, allow_inf_nan=False)

    def recipe(self) -> Recipe:
        """The recipe that they mean. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return load_recipe(self.preset, self.overrides, self.seed)


def usable_processes(recipe: Recipe, asked: int | None) -> int:
    """How many processes a job runs on: those asked for; else one a GPU; else a power of two of the CPU's cores.

    Raises RecipeError if those asked for can't share the recipe's lanes, or are more than the GPUs.
    """
    present = gpus()
    if asked is not None:
        recipe.check_processes(asked)
        if present and asked > present:
            raise RecipeError(
                f"{asked} processes were asked for, but there are {present} GPUs. Use at most as many, or set "
                "CUDA_VISIBLE_DEVICES to nothing to train on the CPU."
            )
        if not present and asked > PROCESSES_A_CORE * usable_cores():
            raise RecipeError(
                f"{asked:,} processes were asked for, but there are {usable_cores()} cores. Use at most as many."
            )
        return asked
    lanes = recipe.data.lanes
    return max(count for count in range(1, lanes + 1) if lanes % count == 0 and count <= (present or usable_cores()))


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
