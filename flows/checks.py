"""What can be found wrong before hours of compute is found here."""

from __future__ import annotations

from diffusion.data.store import check_writable, open_store
from diffusion.evaluation.names import extractor_sha256
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.tracking.connection import connect
from flows.request import TrainingRequest, usable_processes


def check_before_compute(request: TrainingRequest) -> tuple[Recipe, int]:
    """The recipe of a request, and the processes that it runs on here.

    Raises RecipeError if there is no such recipe, it can't be trained here, or an extractor is not set up; StoreError if
    the store can't be written; TrackingError if MLflow does not answer.
    """
    environment, recipe = settings(), request.recipe()
    processes = usable_processes(recipe, request.processes)
    check_writable(open_store(environment.store_uri))
    connect(environment.tracking_uri)
    for extractor in recipe.evaluation.extractors:
        extractor_sha256(extractor, environment.inception)
    return recipe, processes
