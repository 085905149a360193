"""Statistics of features in float64: mergeable moments, the Fréchet and the kernel distance, what lies near what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from diffusion.data.spec import Labels
from diffusion.evaluation.labels import resampled, shuffled, strata
from diffusion.randomness import stream

Vectors = NDArray[np.floating]
"""Features, [samples, dimensions]."""
Floats = NDArray[np.float64]

SEED = 0
KID_SAMPLES = 2000
BOOTSTRAP_DRAWS = 50
EXTRAPOLATION_SIZES = 8
NEIGHBOURS = 5
MANIFOLD_SAMPLES = 4000
HELD_OUT_QUANTILE = 0.05
FEWEST_HELD_OUT = 3
"""Images that are a measure of what is close."""
SAME = 1e-3
"""Of the distance to neighbours: what lies nearer is the same image."""
MOMENT_ROWS = 8192  # of features that are float64 at once
ROWS = 512  # of a distance matrix held at once


@dataclass(frozen=True)
class Moments:
    """Count, mean [d] and scatter (the sum of squared deviations from the mean) [d, d] of a set of features, float64."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: Vectors) -> Moments:
        """The moments of features, computed in float64 a block at a time."""
        total = None
        for start in range(0, len(features), MOMENT_ROWS):
            values = features[start : start + MOMENT_ROWS].astype(np.float64)
            mean = values.mean(axis=0)
            centred = values - mean
            block = cls(len(values), mean, centred.T @ centred)
            total = block if total is None else total.merge(block)
        if total is None:
            raise ValueError("no features")
        return total

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

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """The symmetric root of the covariance [d, d]."""
        values, vectors = np.linalg.eigh(self.covariance)
        root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
        return root


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500), >= 0.

    The trace of the root is the sum of the roots of the eigenvalues of the symmetric C2^(1/2) C1 C2^(1/2), which stay
    real and non-negative where the covariances are singular. `second` keeps its root: the one that stays in a series.
    """
    inner = np.linalg.eigvalsh(second.root @ first.covariance @ second.root)
    trace_of_root = np.sqrt(np.clip(inner, 0, None)).sum()
    means = np.square(first.mean - second.mean).sum()
    distance = means + np.trace(first.covariance) + np.trace(second.covariance) - 2 * trace_of_root
    return float(max(distance, 0.0))


def kernel_distance(
    first: Vectors, second: Vectors, samples: int = KID_SAMPLES, labels: Labels | None = None
) -> tuple[float, float]:
    """KID: the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).

    Of up to `samples` of each set, and its standard deviation over bootstrap draws of both sets, which is too large, by up
    to a factor of two, where the distance is near zero. An unbiased estimate may be negative.

    Args:
        labels: of the first set, where it has a fixed number of each class: so has each draw then. Of such a set fewer pairs are
            of one class than of one that is drawn at random, and pairs within a class count for as much as there.
    """
    kinds = labels, None
    chosen = [
        shuffled(stream(SEED, "kid", side), len(one), kinds[side])[:samples] for side, one in enumerate((first, second))
    ]
    x, y = (one[places].astype(np.float64) for one, places in zip((first, second), chosen, strict=True))
    classes = None if labels is None else labels[chosen[0]]
    of_x, of_y, between = _kernel(x, x), _Pairs(_kernel(y, y), None), _kernel(x, y)
    once = _squared_mmd(_Pairs(of_x, classes), of_y, between, np.ones(len(x)), np.ones(len(y)))
    of_draws = _Pairs(of_x, None if classes is None else strata(classes))
    draws = []
    for draw in range(BOOTSTRAP_DRAWS):
        rng = stream(SEED, "kid bootstrap", draw)
        times_x, times_y = (
            np.bincount(resampled(rng, len(side), kinds), minlength=len(side))
            for side, kinds in ((x, classes), (y, None))
        )
        draws.append(_squared_mmd(of_draws, of_y, between, times_x.astype(np.float64), times_y.astype(np.float64)))
    return once, float(np.std(draws, ddof=1))


def _kernel(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    return (a @ b.T / a.shape[1] + 1) ** 3


class _Pairs:
    """The kernel of the pairs of a set [n, n], and its mean over two points that are drawn at random.

    Points are never paired with themselves or their copies. Where each class has a fixed number of them, that would leave out too
    many pairs of one class: so the mean over the pairs of a class is weighted by how often two points at random are of it.
    Of a class with one point there is no such pair: it counts as if two points at random never were of it.
    """

    def __init__(self, kernel: Floats, labels: Labels | None) -> None:
        self.kernel = kernel
        kinds = np.zeros(len(kernel), np.int64) if labels is None else labels
        places = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
        self.blocks = [(own, kernel[np.ix_(own, own)] if len(places) > 1 else kernel) for own in places]

    def mean(self, times: Floats) -> float:
        """Each point counted as often as it was drawn, [n]."""
        total, weight = times @ self.kernel @ times, times.sum() ** 2
        for places, kernel in self.blocks:
            own = times[places]
            square, count = own @ kernel @ own, own.sum() ** 2
            total, weight = total - square, weight - count
            if pairs := count - np.square(own).sum():
                total += (square - np.square(own) @ np.diag(kernel)) * count / pairs
                weight += count
        return float(total / weight)


def _squared_mmd(xx: _Pairs, yy: _Pairs, xy: Floats, times_x: Floats, times_y: Floats) -> float:
    """From the kernels, each point counted as often as it was drawn."""
    between = times_x @ xy @ times_y / (times_x.sum() * times_y.sum())
    return float(xx.mean(times_x) + yy.mean(times_y) - 2 * between)


def frechet_error(features: Vectors, reference: Moments, labels: Labels | None = None) -> float:
    """Standard deviation of the Fréchet distance over bootstrap draws of the samples, of each class as many as it has.

    A draw repeats samples, which shifts the distance upwards; its spread is what is wanted, not its mean.
    """
    draws = []
    for draw in range(BOOTSTRAP_DRAWS):
        chosen = resampled(stream(SEED, "fid bootstrap", draw), len(features), labels)
        draws.append(frechet_distance(Moments.of(features[chosen]), reference))
    return float(np.std(draws, ddof=1))


def frechet_extrapolated(
    features: Vectors, reference: Moments, labels: Labels | None = None, seed: int = SEED
) -> float:
    """The Fréchet distance of infinitely many samples: it is linear in 1 / n to first order, so a line is fitted to
    random subsets from a third of the samples up to all (Chong & Forsyth 2020, arXiv:1911.07023), each with all classes in their
    proportions.

    Its own error is about twice that of the distance itself.
    """
    sizes = np.linspace(len(features) / 3, len(features), EXTRAPOLATION_SIZES).astype(int)
    distances = []
    for k, size in enumerate(sizes):
        # Each subset is drawn afresh: nested ones would share their fluctuations.
        chosen = shuffled(stream(seed, "fid extrapolation", k), len(features), labels)[:size]
        distances.append(frechet_distance(Moments.of(features[chosen]), reference))
    slope_and_limit = np.polyfit(1 / sizes, distances, 1)
    return float(slope_and_limit[1])


@dataclass(frozen=True)
class Manifold:
    """How samples and real images cover one another in feature space, each in [0, 1] but density."""

    precision: float
    """Share of samples within the neighbourhood of a real image (Kynkäänniemi et al. 2019, arXiv:1904.06991)."""
    recall: float
    """Share of real images within the neighbourhood of a sample."""
    density: float
    """How many neighbourhoods of real images a sample lies in, over k: about 1 for equal distributions
    (Naeem et al. 2020, arXiv:2002.09797)."""
    coverage: float
    """Share of real images with a sample in their neighbourhood."""


def manifold(real: Vectors, samples: Vectors) -> Manifold:
    """Precision, recall, density and coverage with the `NEIGHBOURS`-th neighbour's distance, over as many of each set."""
    count = min(MANIFOLD_SAMPLES, len(real), len(samples))
    real, samples = real[:count].astype(np.float64), samples[:count].astype(np.float64)
    # The nearest of its own set is the point itself.
    real_radius = _nearest(real, real, NEIGHBOURS + 1)[0][:, -1]
    sample_radius = _nearest(samples, samples, NEIGHBOURS + 1)[0][:, -1]
    in_real = np.zeros(count)
    in_samples = np.zeros(count, dtype=bool)
    covered = np.zeros(count, dtype=bool)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        distance = _distances(real[rows], samples)
        inside = distance <= real_radius[rows, None]
        in_real += inside.sum(axis=0)
        covered[rows] = inside.any(axis=1)
        in_samples[rows] = (distance <= sample_radius[None, :]).any(axis=1)
    return Manifold(
        precision=float((in_real > 0).mean()),
        recall=float(in_samples.mean()),
        density=float(in_real.mean() / NEIGHBOURS),
        coverage=float(covered.mean()),
    )


@dataclass(frozen=True)
class Memorisation:
    """Whether samples lie closer to training images than new real images do."""

    ratio: float
    """Share of samples that lie closer to a training image than all but 5 % of the held-out real images do, over the share of new
    images of the same distribution that do: 1 for such images, 20 if everything is copied (less with fewer than 19 held out)."""
    error: float
    """Standard error of the ratio from both sets' sizes, were it 1."""
    nearest: NDArray[np.int64]
    """Index of the nearest training image of each sample."""
    distances: NDArray[np.float64]
    """Its distance, relative to that of that image's own `NEIGHBOURS`-th neighbour that is another image."""
    close: NDArray[np.bool_]
    """Which samples the ratio counts: those closer than all but 5 % of the held-out images."""


def nearest_copies(train: Vectors, held_out: Vectors, samples: Vectors) -> Memorisation:
    """Compare how near to a training image samples and held-out real images lie.

    A distance is taken relative to the one from that training image to its own neighbours: else the classes whose images are
    all alike, such as open water, would be the only ones that count. Neighbours that are the same image once more, and held-out
    images that are training images as well, set no measure: copies of either are copies.
    """
    train = train.astype(np.float64)
    same = SAME * float(np.sqrt(2 * train.var(axis=0).sum()))
    relative, nearest = [], []
    for features in (samples, held_out):
        distances, found = _nearest(features.astype(np.float64), train, 1)
        neighbours, place = np.unique(found[:, 0], return_inverse=True)
        own = _radii(train[neighbours], train, same)
        relative.append(distances[:, 0] / np.maximum(own[place], np.finfo(np.float64).tiny))
        nearest.append(found[:, 0])
    new = relative[1] > SAME
    # Of this quantile the share of new images below is expected to be what it says, however few it is of.
    few = new.sum() < FEWEST_HELD_OUT
    threshold = SAME if few else np.quantile(relative[1][new], HELD_OUT_QUANTILE, method="weibull")
    close, share = relative[0] < threshold, close_share(int(new.sum()))
    spread = share * (1 - share) * (1 / len(samples) + 1 / (new.sum() + 2))
    return Memorisation(float(close.mean()) / share, float(np.sqrt(spread)) / share, nearest[0], relative[0], close)


def close_share(held_out: int) -> float:
    """The share of new images that lie closer to a training image than all but 5 % of so many held-out ones are expected to.

    Of fewer than 19 the closest one is the measure: as likely as any of them, a new one is closer. Of fewer than
    `FEWEST_HELD_OUT` none is, and only the same images are close.
    """
    return HELD_OUT_QUANTILE if held_out < FEWEST_HELD_OUT else max(HELD_OUT_QUANTILE, 1 / (held_out + 1))


def _radii(centres: Vectors, points: Vectors, same: float) -> Floats:
    """How far the `NEIGHBOURS`-th point lies from each centre, of those that are not the same; the farthest where there are fewer."""
    found = []
    for start in range(0, len(centres), ROWS):
        block = _distances(centres[start : start + ROWS], points)
        farthest = block.max(axis=1)
        block[block <= same] = np.inf
        radii = np.partition(block, min(NEIGHBOURS, block.shape[1]) - 1, axis=1)[:, min(NEIGHBOURS, block.shape[1]) - 1]
        found.append(np.where(np.isinf(radii), farthest, radii))
    return np.concatenate(found)


def _distances(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    # In place: a matrix of this size is slower to make than to compute.
    squared = np.add.outer(np.square(a).sum(1), np.square(b).sum(1))
    squared -= 2 * a @ b.T
    np.maximum(squared, 0, out=squared)
    return np.sqrt(squared, out=squared)


def _nearest(queries: Vectors, points: Vectors, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances and indices of the `count` nearest points of each query, nearest first: [queries, count] each."""
    distances, indices = [], []
    for start in range(0, len(queries), ROWS):
        block = _distances(queries[start : start + ROWS], points)
        if count == 1:
            found = block.argmin(axis=1, keepdims=True)
        else:
            found = np.argpartition(block, count - 1, axis=1)[:, :count]
            found = np.take_along_axis(found, np.take_along_axis(block, found, 1).argsort(axis=1), 1)
        indices.append(found)
        distances.append(np.take_along_axis(block, found, 1))
    return np.concatenate(distances), np.concatenate(indices)
