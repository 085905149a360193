"""References that a recipe is scored against: which of them the store lacks, and the one that decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from diffusion.data.manifest import Manifest
from diffusion.errors import DataError
from diffusion.evaluation.reference import Reference, load_reference
from diffusion.features.identity import ExtractorName, identify
from diffusion.jobs.specs import ReferenceJob
from diffusion.recipe import Recipe
from diffusion.settings import Settings
from diffusion.store import layout
from diffusion.store.objects import open_store
from flows.run import job_fields


class Missing(NamedTuple):
    """A reference that is not in the store."""

    job: ReferenceJob
    """What measures it."""
    name: str
    """What it will be called in the store."""
    extractor: str
    """What its extractor is called."""
    damage: str
    """What is wrong with the one that is there; empty where there is none."""


def missing_references(recipe: Recipe, dataset: Manifest, settings: Settings) -> Iterator[Missing]:
    """The references of a recipe's extractors that have to be measured, in their order."""
    store = open_store(settings.store_uri)
    for kind in recipe.evaluation.extractors:
        name, extractor = _named(kind, recipe, dataset, settings)
        try:
            load_reference(store, name)
        except DataError as error:  # missing, damaged, or of a version that did not seal them
            job = ReferenceJob(
                **job_fields("reference", dataset, settings),
                image_size=recipe.data.image_size,
                extractor=kind,
                inception=settings.inception,
            )
            yield Missing(job, name, extractor, str(error) if store.names(name) else "")


def load_deciding_reference(recipe: Recipe, dataset: Manifest, settings: Settings) -> Reference:
    """Real images under the extractor that decides, the recipe's first. Raises DataError if that is not in the store."""
    name, _ = _named(recipe.evaluation.extractors[0], recipe, dataset, settings)
    return load_reference(open_store(settings.store_uri), name)


def _named(kind: ExtractorName, recipe: Recipe, dataset: Manifest, settings: Settings) -> tuple[str, str]:
    known = identify(kind, open_store(settings.store_uri), dataset, settings.inception)
    return layout.reference(dataset.digest, known.name, known.sha256, recipe.data.image_size), known.name
