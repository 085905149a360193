"""Feature extractors: the shipped `eurosat` classifier, a dataset's own, and the usual `inception` network, each known by its sha256.

A figure is only comparable with figures of the same extractor, so its name travels with every metric (`fid_eurosat`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor

from diffusion.data.manifest import Manifest
from diffusion.data.spec import Images
from diffusion.errors import RecipeError
from diffusion.features.classifier import Classifier
from diffusion.features.identity import SHIPPED_SHA256, SHIPPED_WEIGHTS, Known, find_own, required_inception
from diffusion.features.inception import read_inception
from diffusion.model.placement import place
from diffusion.pixels import Pixels
from diffusion.settings import InceptionSource
from diffusion.store import layout
from diffusion.store.objects import Store


@dataclass(frozen=True)
class Extractor:
    """A feature extractor on one device."""

    name: str
    sha256: str
    """Of its weights: two figures are comparable only if this is equal."""
    embed: Callable[[Images], Tensor]
    """Images [n, height, width, bands] -> features [n, dimensions], float32, on the device."""
    classify: Callable[[NDArray[np.float32]], NDArray[np.int64]] | None
    """Features -> class indices, where the extractor knows the classes."""


def load_extractor(
    known: Known,
    store: Store,
    dataset: Manifest,
    device: torch.device,
    inception: InceptionSource | None,
    copies: Path,
) -> Extractor:
    """That extractor. Raises RecipeError if it is not to be had or is not the file that it should be.

    Args:
        copies: folder for local copies of what is fetched.
    """
    if known.kind == "eurosat":
        return shipped(device)
    if known.kind == "own":
        return _own(known, store, dataset, device)
    return load_inception(inception, device, copies)


def shipped(device: torch.device) -> Extractor:
    """The classifier that comes with the package."""
    known, network = Known("eurosat", "eurosat", SHIPPED_SHA256), _classifier(_shipped_weights(), device)
    return _extractor(known, network, lambda images: eurosat_input(images, device), device, knows_classes=True)


def eurosat_input(images: Images, device: torch.device) -> Tensor:
    """What that classifier sees of RGB images of 8 bits: [n, 3, height, width], -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1


def _shipped_weights() -> bytes:
    return _verified(SHIPPED_WEIGHTS.read_bytes(), SHIPPED_SHA256, str(SHIPPED_WEIGHTS))


@dataclass(frozen=True)
class Teacher:
    """An extractor that training looks at."""

    sha256: str
    see: Callable[[Tensor], Tensor]
    """Images in process space [n, bands, height, width] -> features [n, 128, 8, 8]."""


def load_teacher(known: Known, store: Store, dataset: Manifest, device: torch.device) -> Teacher:
    """That extractor, of kind eurosat or own. Raises RecipeError as `load_extractor` does."""
    shipped, pixels = known.kind == "eurosat", Pixels(dataset.images)
    network = _classifier(_shipped_weights() if shipped else _own_weights(known, store, dataset), device)

    @torch.no_grad()
    def see(x0: Tensor) -> Tensor:
        return network.feature_map(
            (pixels.to_unit(x0) if shipped else x0).contiguous(memory_format=torch.channels_last)
        )

    return Teacher(known.sha256, see)


def _own_weights(known: Known, store: Store, dataset: Manifest) -> bytes:
    name = layout.own_extractor_weights(dataset.digest, known.sha256)
    try:
        content = store.read(name)
    except KeyError:
        raise RecipeError(
            f"The extractor {store.uri}/{name} is missing, and its document is there: delete "
            f"{layout.own_extractor(dataset.digest)}."
        ) from None
    return _verified(content, known.sha256, f"{store.uri}/{name}")


def _own(known: Known, store: Store, dataset: Manifest, device: torch.device) -> Extractor:
    own, pixels = find_own(store, dataset.digest), Pixels(dataset.images)
    return _extractor(
        known,
        _classifier(_own_weights(known, store, dataset), device),
        lambda images: pixels.encode(images).to(device),
        device,
        own is not None and own.task == "classes",
    )


def _classifier(content: bytes, device: torch.device) -> Classifier:
    weights = load(content)
    bands, outputs = weights["trunk.0.conv.weight"].shape[1], len(weights["head.bias"])
    network = Classifier(bands, outputs, fused=True)
    network.load_state_dict(weights)
    return place(network.float().eval(), device)


def _extractor(
    known: Known, network: Classifier, encode: Callable[[Images], Tensor], device: torch.device, knows_classes: bool
) -> Extractor:
    @torch.inference_mode()
    def embed(images: Images) -> Tensor:
        return network.features(encode(images).contiguous(memory_format=torch.channels_last))

    @torch.inference_mode()
    def classify(features: NDArray[np.float32]) -> NDArray[np.int64]:
        return network.head(torch.from_numpy(features).to(device)).argmax(dim=1).cpu().numpy()

    return Extractor(known.name, known.sha256, embed, classify if knows_classes else None)


def load_inception(inception: InceptionSource | None, device: torch.device, copies: Path) -> Extractor:
    """The Inception network that the user names. Raises RecipeError if none is named, or as `read_inception` does."""
    source = required_inception(inception)
    network = torch.jit.load(io.BytesIO(read_inception(source, copies)), device)
    network.eval()

    @torch.inference_mode()
    def embed(images: Images) -> Tensor:
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), return_features=True).float()

    return Extractor("inception", source.sha256, embed, None)


def _verified(content: bytes, sha256: str, where: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RecipeError(
            f"The extractor {where} is not the file that it should be: its sha256 is {found}, expected {sha256}. It was not loaded."
        )
    return content
