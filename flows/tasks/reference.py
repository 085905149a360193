"""Shards -> features of the real images."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.data.manifest import Manifest
from diffusion.errors import DataError
from diffusion.evaluation.reference import load_reference
from diffusion.features.identity import identify
from diffusion.jobs.specs import ReferenceJob
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.store import layout
from diffusion.store.objects import open_store
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.progress import say
from flows.run import job_fields, run_phase
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
    store = open_store(environment.store_uri)
    size = recipe.data.image_size
    for extractor in recipe.evaluation.extractors:
        known = identify(extractor, store, dataset, environment.inception)
        name = layout.reference(dataset.digest, known.name, known.sha256, size)
        try:
            load_reference(store, name)
            continue
        except DataError as error:  # missing, damaged, or of a version that did not seal them
            if store.names(name):
                say(str(error))
        spec = ReferenceJob(
            **job_fields("reference", dataset, environment),
            image_size=size,
            extractor=extractor,
            inception=environment.inception,
        )
        folder = environment.runs / name.removesuffix(".safetensors")
        title = f"Measuring real images ({known.name})"
        job = Job("diffusion.evaluation.measure_reference", spec, folder, "reference")
        run_phase(title, f"reference-{extractor}", job, workers, recipe)
