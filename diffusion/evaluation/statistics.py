"""Statistics of features in float64: streaming moments, the Fréchet distance, the kernel distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.randomness import stream

Features = NDArray[np.floating]
"""[samples, dimensions]"""

KID_SUBSETS = 50
KID_SUBSET_SIZE = 500


@dataclass(frozen=True)
class Moments:
    """Count, mean [d] and scatter (the sum of squared deviations from the mean) [d, d] of a set of features, float64."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> Moments:
        """The moments of a batch of features."""
        values = features.astype(np.float64)
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan et al. 1979)."""
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        cross = np.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + cross)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """The unbiased covariance [d, d]."""
        return self.scatter / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500), >= 0.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), which stay
    real and non-negative where the covariances are singular.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second.covariance @ root)
    trace_of_root = np.sqrt(np.clip(inner, 0, None)).sum()
    means = np.square(first.mean - second.mean).sum()
    distance = means + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return float(max(distance, 0.0))


def kernel_distance(first: Features, second: Features, seed: int = 0) -> tuple[float, float]:
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).

    Mean over random subsets of both sets, and the standard error of that mean as the subsets' spread suggests it. An
    unbiased estimate may be negative.
    """
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    estimates = []
    for subset in range(KID_SUBSETS):
        rng = stream(seed, "kid subset", subset)
        x = first[rng.choice(len(first), size, replace=False)].astype(np.float64)
        y = second[rng.choice(len(second), size, replace=False)].astype(np.float64)
        estimates.append(_squared_mmd(x, y))
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / np.sqrt(KID_SUBSETS))


def _squared_mmd(x: Features, y: Features) -> float:
    n, dimensions = x.shape

    def kernel(a: Features, b: Features) -> NDArray[np.float64]:
        return (a @ b.T / dimensions + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())
