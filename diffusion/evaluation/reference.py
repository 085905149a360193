"""The reference that samples are held against: features of the real images. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from diffusion.data.store import Store
from diffusion.errors import DataError
from diffusion.evaluation.statistics import Moments


@dataclass(frozen=True)
class Reference:
    """Features of the real images under one extractor."""

    train: Moments
    """Moments of all training images."""
    train_features: NDArray[np.float32]
    """Features of the first training images, all where they fit."""
    train_labels: NDArray[np.int64]
    """Their classes."""
    test_features: NDArray[np.float32]
    """Features of all test images."""


def load_reference(store: Store, name: str) -> Reference:
    """Read a reference. Raises DataError if it has not been measured."""
    try:
        tensors = load(store.read(name))
    except KeyError:
        raise DataError(f"The reference {store.uri}/{name} is missing. Measure it first.") from None
    moments = Moments(int(tensors["count"][0]), tensors["mean"], tensors["scatter"])
    return Reference(moments, tensors["train_features"], tensors["train_labels"], tensors["test_features"])
