"""What can be found wrong before hours of compute is found here."""

from __future__ import annotations

from diffusion.data.store import check_writable, open_store
from diffusion.evaluation.names import required_inception
from diffusion.recipe import Recipe
from diffusion.settings import settings
from flows.engines.placement import Workers
from flows.request import TrainingRequest, usable_workers
from flows.run import open_tracking


def check_before_compute(request: TrainingRequest) -> tuple[Recipe, Workers]:
    """The recipe of a request, and what its jobs may run on.

    Raises RecipeError if there is no such recipe, it can't be trained here, or an extractor is not set up; StoreError if
    the store can't be written; TrackingError if MLflow does not answer, or has lost the experiment.
    """
    environment, recipe = settings(), request.recipe()
    workers = usable_workers(recipe, request.processes)
    check_writable(open_store(environment.store_uri))
    if "inception" in recipe.evaluation.extractors:
        required_inception(environment.inception)
    request.options()
    open_tracking(environment)
    return recipe, workers
