"""Two models compared sample by sample. No torch in here.

All models draw sample i from the same noise and class, and are measured on the same test images with the same noise: what one has by
luck, the other has as well. So both are resampled together, and only the difference is looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from diffusion.data.spec import Labels
from diffusion.errors import DataError
from diffusion.evaluation.labels import resampled
from diffusion.evaluation.reference import Reference
from diffusion.evaluation.scores import Scores
from diffusion.evaluation.statistics import Moments, close_share, frechet_distance
from diffusion.randomness import stream
from diffusion.store import layout
from diffusion.store.objects import Store

DRAWS = 200
SEED = 0
FEWEST = 10
"""Samples of a class by which it can be judged."""
OUTSIDE = 0.05
"""Share of the draws that lies outside an interval."""


@dataclass(frozen=True)
class Evidence:
    """What a checkpoint's scores were computed from."""

    features: NDArray[np.float32]
    """Of its samples under the first extractor, [samples, dimensions]."""
    close: NDArray[np.bool_]
    """Which samples lie closer to a training image than all but 5 % of the test images do, [samples]."""
    bits: NDArray[np.float64]
    """The bound of each test image in bits a subpixel, [images]."""
    labels: Labels | None
    """The classes of its samples, [samples]; None for an unconditional network."""

    def to_bytes(self) -> bytes:
        """As safetensors."""
        tensors = {"features": self.features, "close": self.close.astype(np.uint8), "bits": self.bits}
        return save(tensors if self.labels is None else tensors | {"labels": self.labels})

    def of_class(self, label: int) -> NDArray[np.float32]:
        """The features of a class's samples."""
        return self.features[self.labels == label] if self.labels is not None else self.features[:0]


def load_evidence(store: Store, run: str, scores: Scores, evaluation: str = "", classes: int = 0) -> Evidence:
    """What the scores of a run were computed from. Raises DataError if it is gone or damaged.

    Args:
        classes: how many the dataset has. Before protocol 4 samples came of these in turn, which evidence did not say.
    """
    name = layout.evidence(run, scores.step, evaluation)
    try:
        data = store.read(name)
    except KeyError:
        raise DataError(f"{store.uri}/{name}, by which models are compared, is gone.") from None
    if hashlib.sha256(data).hexdigest() != scores.evidence_sha256:
        raise DataError(f"{store.uri}/{name} is damaged: it is not what the scores of {run} were computed from.")
    tensors = load(data)
    features, labels = tensors["features"], tensors.get("labels")
    if labels is None and classes and scores.parts("fid_of_class"):
        labels = np.arange(len(features)) % classes
    return Evidence(features, tensors["close"].astype(bool), tensors["bits"], labels)


@dataclass(frozen=True)
class Difference:
    """A figure of one model minus that of another, or over it, with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """How a model's figures differ from another's. Lower is better in all."""

    fid: Difference
    bits_per_dim: Difference | None
    """None where images have no likelihood in bits."""
    memorisation: Difference


def compare(new: Evidence, old: Evidence, reference: Reference) -> Comparison:
    """The differences, of as many samples and test images each."""

    def fid(chosen: NDArray[np.int64]) -> float:
        first, second = (frechet_distance(Moments.of(one.features[chosen]), reference.train) for one in (new, old))
        return first - second

    alike = new.labels is not None and old.labels is not None and np.array_equal(new.labels, old.labels)
    labels = new.labels if alike else None
    bits = new.bits - old.bits
    close = (new.close.astype(np.float64) - old.close) / close_share(len(reference.test_features))
    return Comparison(
        fid=_bootstrap(fid, len(new.features), "fid", labels),
        bits_per_dim=_bootstrap(lambda chosen: float(bits[chosen].mean()), len(bits), "bits") if len(bits) else None,
        memorisation=_bootstrap(lambda chosen: float(close[chosen].mean()), len(close), "close", labels),
    )


def ratio_of_class(new: Evidence, old: Evidence, reference: Reference, label: int) -> Difference | None:
    """The FID of a class over the other model's; None where its samples, or its real images, are too few for any."""
    real = Moments.of(reference.train_features[reference.train_labels == label])
    first, second = new.of_class(label), old.of_class(label)
    if len(first) != len(second) or min(len(first), real.count) < FEWEST:
        return None

    def log_ratio(chosen: NDArray[np.int64]) -> float:
        distances = (frechet_distance(Moments.of(one[chosen]), real) for one in (first, second))
        return float(np.subtract(*np.log(np.maximum([*distances], np.finfo(float).tiny))))

    found = _bootstrap(log_ratio, len(first), "class")
    return Difference(*(float(np.exp(value)) for value in (found.value, found.low, found.high)))


def variation_of_classes(evidence: Evidence, reference: Reference, classes: int) -> dict[int, float]:
    """By class, the total variance of its samples' features over that of its real images: 0 if all samples are alike.

    Classes with too few samples or real images to tell are left out.
    """
    found = {}
    for label in range(classes):
        real, own = reference.train_features[reference.train_labels == label], evidence.of_class(label)
        if min(len(real), len(own)) >= FEWEST and (spread := float(real.var(axis=0).sum())) > 0:
            found[label] = float(own.var(axis=0).sum()) / spread
    return found


def _bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], count: int, purpose: str, labels: Labels | None = None
) -> Difference:
    """The basic bootstrap interval (Davison & Hinkley 1997, "Bootstrap methods and their application", eq. 5.6).

    What a draw is off from the figure, the figure is taken to be off from the truth: so it also corrects for the bias of the
    Fréchet distance, which finitely many samples raise, and draws of draws raise once more.
    """
    value = statistic(np.arange(count))
    draws = [statistic(resampled(stream(SEED, f"comparison {purpose}", draw), count, labels)) for draw in range(DRAWS)]
    low, high = np.quantile(draws, [OUTSIDE / 2, 1 - OUTSIDE / 2])
    return Difference(value, float(2 * value - high), float(2 * value - low))
