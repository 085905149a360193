"""What identifies an extractor and its reference, without loading either. No torch in here."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import urlsplit

from diffusion.errors import RecipeError
from diffusion.settings import InceptionSource

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "eurosat-classifier-v1.safetensors"
SHIPPED_SHA256 = "0d556bac26d9b28c583a765016e12bfe683a80150bb7e05f78a6d1b1b65f3a17"

REFERENCE_VERSION = 2


def extractor_sha256(name: str, inception: InceptionSource | None) -> str:
    """The digest that the extractor's weights must have. Raises RecipeError for an Inception network that is not set up."""
    return SHIPPED_SHA256 if name == "eurosat" else required_inception(inception).sha256


def required_inception(inception: InceptionSource | None) -> InceptionSource:
    """The source of the Inception network. Raises RecipeError if there is none."""
    if inception is None:
        raise RecipeError(
            "The extractor 'inception' is not part of the package: set TRAIN_DIFFUSION_INCEPTION to the path or URL of its "
            "TorchScript file and TRAIN_DIFFUSION_INCEPTION_SHA256 to its sha256, or use evaluation.extractors: [eurosat]."
        )
    if "@" in urlsplit(inception.location).netloc:
        raise RecipeError(
            f"TRAIN_DIFFUSION_INCEPTION '{inception.location}' has a user or password in its address. Download the file and "
            "name its path."
        )
    if not re.fullmatch("[0-9a-f]{64}", inception.sha256):
        raise RecipeError(
            f"TRAIN_DIFFUSION_INCEPTION_SHA256 is '{inception.sha256}', not the sha256 (64 hexadecimal digits) of the file."
        )
    return inception


def reference_name(dataset: str, extractor: str, sha256: str, image_size: int) -> str:
    """Where the reference of an extractor lies in the store: named by all that it was computed from."""
    key = json.dumps([REFERENCE_VERSION, dataset, extractor, sha256, image_size])
    return f"references/{extractor}-{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
