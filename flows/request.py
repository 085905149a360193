"""What a user asks for: the flow's parameters, and what they mean on this machine."""

from __future__ import annotations

import os
from glob import glob
from typing import Any

from pydantic import BaseModel, ConfigDict

from diffusion.data.find import EUROSAT
from diffusion.errors import RecipeError
from diffusion.recipe import Recipe, load_recipe

CHECKPOINT_EVERY_IMAGES = 250_000


class TrainingRequest(BaseModel):
    """The parameters of one flow run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    overrides: dict[str, Any] = {}
    seed: int = 0
    source: str = EUROSAT
    processes: int | None = None

    def recipe(self) -> Recipe:
        """The recipe that they mean. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return load_recipe(self.preset, self.overrides, self.seed)


def usable_processes(recipe: Recipe, asked: int | None) -> int:
    """How many processes a job runs on: those asked for; else one a GPU; else a power of two of the CPU's cores.

    Raises RecipeError if the recipe's lanes can't be shared evenly by those asked for.
    """
    lanes = recipe.data.lanes
    if asked is not None:
        if asked < 1 or lanes % asked or (recipe.reduction == "exact" and asked & (asked - 1)):
            fitting = [count for count in range(1, lanes + 1) if lanes % count == 0]
            raise RecipeError(
                f"processes is {asked}, but the recipe's {lanes} lanes can be shared evenly only by "
                f"{', '.join(map(str, fitting))}. Choose one of these, or another data.lanes (which makes another recipe)."
            )
        return asked
    devices = _gpus() or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(count for count in range(1, lanes + 1) if lanes % count == 0 and count <= max(1, devices))


def _gpus() -> int:
    if not glob("/dev/nvidia[0-9]*"):  # torch takes seconds to import, and has nothing to tell here
        return 0
    import torch

    return torch.cuda.device_count()
