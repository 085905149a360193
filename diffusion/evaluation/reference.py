"""The reference that samples are held against: features of the real images, sealed by a digest. No torch in here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from diffusion.data.sealed import seal, unseal
from diffusion.errors import DataError
from diffusion.evaluation.statistics import Moments
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.trust.identifiers import Sha256


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
    """Features of the first test images, all where they fit."""
    class_counts: NDArray[np.int64] | None = None
    """How many training images each class has, [classes]; None in references of before."""


class Seal(BaseModel):
    """The document beside a reference's tensors, written after them: FID and the gates depend on every byte of those."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = 1
    sha256: Sha256


def write_reference(store: Store, name: str, reference: Reference) -> None:
    """Write a reference, its seal last. Raises StoreError."""
    tensors = {
        "count": np.array([reference.train.count]),
        "mean": reference.train.mean,
        "scatter": reference.train.scatter,
        "train_features": reference.train_features,
        "train_labels": reference.train_labels,
        "test_features": reference.test_features,
    }
    if reference.class_counts is not None:
        tensors["class_counts"] = reference.class_counts
    data = save({key: np.ascontiguousarray(value) for key, value in tensors.items()})
    store.write(name, data)
    store.write(layout.reference_seal(name), seal(Seal(sha256=hashlib.sha256(data).hexdigest())))


def load_reference(store: Store, name: str) -> Reference:
    """Read a reference. Raises DataError if it has not been measured, has no seal, or is not what was sealed."""
    try:
        data, sealed = store.read(name), unseal(Seal, store.read(layout.reference_seal(name)))
        if hashlib.sha256(data).hexdigest() != sealed.sha256:
            raise ValueError("its sha256 is not the one in its seal")
        tensors = load(data)
        moments = Moments(int(tensors["count"][0]), tensors["mean"], tensors["scatter"])
        return Reference(
            moments,
            tensors["train_features"],
            tensors["train_labels"],
            tensors["test_features"],
            tensors.get("class_counts"),
        )
    except KeyError:
        raise DataError(f"The reference {store.uri}/{name}, or its seal, is missing: it must be measured.") from None
    except (ValueError, SafetensorError) as error:
        raise DataError(f"The reference {store.uri}/{name} is damaged ({error}): it must be measured again.") from error
