"""What can be found wrong before hours of compute is found here."""

from __future__ import annotations

from diffusion.data.store import check_writable, open_store
from diffusion.evaluation.names import extractor_sha256
from diffusion.recipe import Recipe
from diffusion.settings import settings
from diffusion.tracking.connection import connect


def check_before_compute(recipe: Recipe) -> None:
    """Raises StoreError, TrackingError or RecipeError if the store can't be written, MLflow does not answer, or an
    extractor is not set up."""
    environment = settings()
    check_writable(open_store(environment.store_uri))
    connect(environment.tracking_uri)
    for extractor in recipe.evaluation.extractors:
        extractor_sha256(extractor, environment.inception)
