"""Feature extractors: the shipped `eurosat` classifier and the standard `inception` network, each known by its sha256.

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

from diffusion.data.download import download
from diffusion.data.eurosat import CLASSES
from diffusion.errors import DataError, RecipeError
from diffusion.evaluation.classifier import EuroSATClassifier
from diffusion.evaluation.names import SHIPPED_SHA256, SHIPPED_WEIGHTS, required_inception
from diffusion.model.placement import place
from diffusion.settings import InceptionSource
from diffusion.trust.reading import read_file

MAX_BYTES = 512 << 20
"""The Inception network has 95 MB."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor on one device."""

    name: str
    sha256: str
    """Of its weights: two figures are comparable only if this is equal."""
    embed: Callable[[NDArray[np.uint8]], Tensor]
    """Images [n, height, width, 3] -> features [n, dimensions], float32, on the device."""
    classify: Callable[[NDArray[np.float32]], NDArray[np.int64]] | None
    """Features -> class indices, where the extractor knows the classes."""


def load_extractor(name: str, device: torch.device, inception: InceptionSource | None) -> Extractor:
    """The extractor of that name. Raises RecipeError if it is not to be had or is not the file that it should be."""
    if name == "eurosat":
        return _eurosat(device)
    return _inception(device, inception)


def _eurosat(device: torch.device) -> Extractor:
    weights = load(_verified(SHIPPED_WEIGHTS.read_bytes(), SHIPPED_SHA256, str(SHIPPED_WEIGHTS)))
    network = EuroSATClassifier(len(CLASSES), fused=True)
    network.load_state_dict(weights)
    network = place(network.float().eval(), device)

    @torch.inference_mode()
    def embed(images: NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        return network.features(pixels.contiguous(memory_format=torch.channels_last))

    @torch.inference_mode()
    def classify(features: NDArray[np.float32]) -> NDArray[np.int64]:
        return network.head(torch.from_numpy(features).to(device)).argmax(dim=1).cpu().numpy()

    return Extractor("eurosat", SHIPPED_SHA256, embed, classify)


def _inception(device: torch.device, inception: InceptionSource | None) -> Extractor:
    source = required_inception(inception)
    network = torch.jit.load(io.BytesIO(_verified(_content(source.location), source.sha256, source.location)), device)
    network.eval()

    @torch.inference_mode()
    def embed(images: NDArray[np.uint8]) -> Tensor:
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), return_features=True).float()

    return Extractor("inception", source.sha256, embed, None)


def _content(location: str) -> bytes:
    try:
        if location.startswith("https://"):
            return download(location, MAX_BYTES)
        return read_file(Path(location), MAX_BYTES)
    except DataError as error:
        raise RecipeError(f"The extractor is not to be had: {error}") from error


def _verified(content: bytes, sha256: str, where: str) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RecipeError(
            f"The extractor {where} is not the file that it should be: its sha256 is {found}, expected {sha256}. It was not loaded."
        )
    return content
