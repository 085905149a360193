"""How figures are made, and so which of them compare."""

from __future__ import annotations

import hashlib
import json

from diffusion.data.manifest import Manifest
from diffusion.errors import DataError
from diffusion.features.identity import identify
from diffusion.recipe import Evaluation, Recipe
from diffusion.settings import InceptionSource
from diffusion.store.objects import Store

PROTOCOL = "5: fixed noise by sample index, classes in proportion, of real images too"
"""By number: figures of another protocol do not compare."""
TOLD = ", given their class"
"""End of the protocol of figures whose bits/dim are of images given their class."""


def evaluation_as(recipe: Recipe, trained: Recipe) -> Evaluation:
    """How a model that was trained by one recipe is scored as another recipe says.

    Raises DataError if its images are of another size.
    """
    if trained.data.image_size != recipe.data.image_size:
        raise DataError("Images of another size are another model's.")
    # Who of the two can't be guided is no fault of the other's: each draws as well as it can.
    if not trained.can_be_guided:
        return recipe.evaluation.model_copy(update={"guidance": 1.0})
    if not recipe.can_be_guided:
        own = trained.evaluation
        return recipe.evaluation.model_copy(
            update={"guidance": own.guidance, "guidance_interval": own.guidance_interval}
        )
    return recipe.evaluation


def evaluation_name(
    store: Store, dataset: Manifest, weights: str | None, evaluation: Evaluation, inception: InceptionSource | None
) -> str:
    """What the scores of a checkpoint are called that are not by its own recipe: all that they depend on decides about it."""
    by = [identify(one, store, dataset, inception).sha256 for one in evaluation.extractors]
    known = [PROTOCOL, by, dataset.digest, weights, evaluation.model_dump(mode="json")]
    return f"as-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]}"


def protocol(recipe: Recipe) -> str:
    """How a version's figures were made: all that must be alike before two are compared."""
    evaluation, told = recipe.evaluation, TOLD if recipe.needs_class else ""
    interval = evaluation.guidance_interval
    where = f" at noise of {interval[0]:g} to {interval[1]:g}" if interval else ""
    return (
        f"{PROTOCOL}; {evaluation.samples} samples by {evaluation.sampler} in {evaluation.sampler_steps} steps ({evaluation.spacing}, "
        f"eta {evaluation.eta:g}, guidance {evaluation.guidance:g}{where}); bits/dim of {evaluation.likelihood_images} images at "
        f"{evaluation.likelihood_timesteps} timesteps{told}"
    )
