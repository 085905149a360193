"""What identifies an extractor, without loading it. No torch in here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from diffusion.data.manifest import Manifest
from diffusion.data.sealed import unseal
from diffusion.data.sources.eurosat import CLASSES
from diffusion.data.spec import RGB, ImageSpec
from diffusion.errors import DataError, RecipeError
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.trust.identifiers import Sha256

if TYPE_CHECKING:  # a served model's environment has no settings to read
    from diffusion.settings import InceptionSource

ExtractorName = Literal["eurosat", "inception", "own"]
"""What a recipe may call for."""

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "eurosat-classifier-v1.safetensors"
SHIPPED_SHA256 = "0d556bac26d9b28c583a765016e12bfe683a80150bb7e05f78a6d1b1b65f3a17"


@dataclass(frozen=True)
class Known:
    """An extractor by what identifies it."""

    kind: ExtractorName
    name: str
    """Part of its figures' names: `eurosat`, `inception`, or `own-` and the beginning of the dataset's digest."""
    sha256: str
    """Of its weights."""


class OwnExtractor(BaseModel):
    """The document beside the weights of a dataset's own extractor, written after them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    sha256: Sha256
    task: Literal["classes", "views", "quarter turns"]
    """What it has learned to tell; an earlier version's, where there are no classes, which way images were turned."""
    accuracy: float
    """Share of the test split that it tells rightly."""
    chance: float
    """What guessing would reach."""

    @property
    def told(self) -> str:
        """What it tells, and how well, for people."""
        tells = {"classes": "their classes", "views": "which of many views is of the same image"}.get(
            self.task, self.task
        )
        return f"{tells}, of test images: {self.accuracy:.1%} right; by guessing: {self.chance:.1%}"


def accepts(kind: ExtractorName, spec: ImageSpec) -> bool:
    """Whether an extractor's features mean something for such images."""
    if kind == "own":
        return True
    rgb = spec.bands == RGB and spec.dtype == "uint8"
    return rgb and (kind == "inception" or spec.classes == CLASSES)


def find_own(store: Store, dataset: str) -> OwnExtractor | None:
    """What is known of a dataset's own extractor; None if it has not been trained, or its document is damaged."""
    try:
        return unseal(OwnExtractor, store.read(layout.own_extractor(dataset)))
    except (KeyError, ValueError):
        return None


def identify(kind: ExtractorName, store: Store, dataset: Manifest, inception: InceptionSource | None) -> Known:
    """What identifies the extractor of that kind for a dataset.

    Raises RecipeError for an Inception network that is not set up, DataError for an own extractor that is not trained.
    """
    if kind == "eurosat":
        return Known(kind, kind, SHIPPED_SHA256)
    if kind == "inception":
        return Known(kind, kind, required_inception(inception).sha256)
    own = find_own(store, dataset.digest)
    if own is None:
        raise DataError(f"The store {store.uri} has no extractor for the dataset {dataset.digest}: it must be trained.")
    return Known(kind, f"own-{dataset.digest[:8]}", own.sha256)


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
