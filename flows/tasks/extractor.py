"""Shards -> a feature network of the dataset's own, where none that is shipped is for such images."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.data.manifest import Manifest
from diffusion.features.identity import find_own
from diffusion.jobs.specs import ExtractorJob
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.store.objects import open_store
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.progress import say
from flows.run import job_fields, run_phase
from flows.tasks.retrying import RETRIED


@task(
    name="train extractor",
    task_run_name="train extractor",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def _train(dataset: Manifest, recipe: Recipe, workers: Workers) -> None:
    """Train the dataset's own extractor, once per dataset version."""
    environment = settings()
    store = open_store(environment.store_uri)
    if find_own(store, dataset.digest) is None:
        spec = ExtractorJob(**job_fields("extractor", dataset, environment))
        folder = environment.runs / "extractors" / dataset.digest[:16]
        job = Job(spec, folder, "reference")
        alone = Workers(counts=(1,), cores=workers.cores)  # whatever the recipe's other jobs run on
        run_phase("Training an extractor of these images", "extractor", job, alone, recipe, workers.cores)
    own = find_own(store, dataset.digest)
    assert own is not None
    say(f"The extractor tells {own.told}.")


def train_extractor(dataset: Manifest, recipe: Recipe, workers: Workers) -> None:
    """The extractor of the dataset's own, if the recipe names one."""
    if "own" in recipe.evaluation.extractors:
        _train(dataset, recipe, workers)
