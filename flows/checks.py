"""What can be found wrong before hours of compute is found here."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusion.errors import StoreError
from diffusion.features.identity import required_inception
from diffusion.features.inception import read_inception
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.store.objects import FolderStore, check_writable, open_store
from diffusion.tracking.experiment import open_tracking
from flows.engines.known import engine
from flows.engines.placement import Workers
from flows.request import TrainingRequest
from flows.tasks.retrying import DELAYS, patiently

LEAST_FREE = 1_000_000_000
"""Bytes."""


def check_free(folder: Path) -> None:
    """Raises StoreError if so little is free there that a run would soon find the disk full."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise StoreError(
            f"{free / 1e9:.1f} GB are free on the disk of {folder}; a run wants {LEAST_FREE / 1e9:.0f} GB to begin with. Free some, "
            "with make clean for one, or set TRAIN_DIFFUSION_HOME or TRAIN_DIFFUSION_STORE to another disk."
        )


def check_before_compute(request: TrainingRequest, patient: bool = False) -> tuple[Recipe, Workers]:
    """As `check_request`. Raises TrackingError as well, if MLflow does not answer, or has lost the experiment.

    Args:
        patient: whether servers that are away for some minutes are waited for: where nobody is, who would start the run again.
    """

    def check() -> tuple[Recipe, Workers]:
        checked = check_request(request)
        open_tracking(settings())
        return checked

    return patiently(check, DELAYS if patient else ())


def check_request(request: TrainingRequest) -> tuple[Recipe, Workers]:
    """The recipe of a request, and what its jobs may run on.

    Raises RecipeError if there is no such recipe, it can't be trained here, or an extractor is not set up; StoreError if
    the store can't be written, a network can't be fetched, or a disk here is all but full.
    """
    environment, recipe = settings(), request.recipe()
    workers = engine().workers(recipe, request.processes)
    store = open_store(environment.store_uri)
    check_writable(store)
    for folder in [environment.home, *([store.folder] if isinstance(store, FolderStore) else [])]:
        check_free(folder)
    if "inception" in recipe.evaluation.extractors:
        read_inception(required_inception(environment.inception), environment.shard_copies)
    request.options()
    return recipe, workers
