"""What a user asks for: the flow's parameters, and what they mean."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion.data.sources.find import EUROSAT
from diffusion.data.sources.source import SourceOptions, parse_options
from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from diffusion.tracking.gates import DEFAULT_MARGINS, Margins
from flows.engines.known import engine

CHECKPOINT_EVERY_IMAGES = 250_000
CHECKPOINTS_AT_LEAST = 20  # in a run: metrics reach MLflow, and a crash loses work, by the checkpoint

StartFrom = Literal["scratch", "champion"]


def usual_preset() -> str:
    """Where none is asked for: the recipe for GPUs where there is one, else the one that a CPU trains in minutes.

    Raises RecipeError for a GPU that can't be used: night after night another model would be trained, and nobody would know.
    """
    if engine().gpus():
        return "eurosat"
    if why := engine().broken_gpu():
        raise RecipeError(
            f"This machine has a GPU that CUDA can't use ({why}). Mend it (nvidia-smi and dmesg may say what it lacks), or say what "
            "is trained without it: preset=demo, here or under `parameters:` in prefect.yaml."
        )
    return "demo"


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
    margins: Margins = DEFAULT_MARGINS

    def recipe(self) -> Recipe:
        """The recipe that they mean. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return load_recipe(self.preset, self.overrides, self.seed)

    def options(self) -> SourceOptions:
        """How the source's images are meant. Raises RecipeError, with the nearest valid name where one is misspelt."""
        return parse_options(self.source_options)


def checkpoint_every(recipe: Recipe) -> int:
    """Steps between checkpoints."""
    steps = (recipe.total_steps - recipe.first_step) // CHECKPOINTS_AT_LEAST
    return max(1, min(CHECKPOINT_EVERY_IMAGES // recipe.data.batch_size, steps))
