"""Shards -> features of the real images."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.data.manifest import Manifest
from diffusion.recipe import Recipe
from diffusion.settings import settings
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.progress import say
from flows.references import missing_references
from flows.run import run_phase
from flows.tasks.retrying import RETRIED


@task(
    name="measure reference",
    task_run_name="measure reference",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def measure_reference(dataset: Manifest, recipe: Recipe, workers: Workers) -> None:
    """Features and moments of the real images, once per dataset version, extractor and image size."""
    environment = settings()
    for missing in missing_references(recipe, dataset, environment):
        if missing.damage:
            say(missing.damage)
        folder = environment.runs / missing.name.removesuffix(".safetensors")
        title = f"Measuring real images ({missing.extractor})"
        job = Job(missing.job, folder, "reference")
        run_phase(title, f"reference-{missing.job.extractor}", job, workers, recipe)
