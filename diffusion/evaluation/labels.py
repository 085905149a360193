"""Which classes samples are of. No torch in here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffusion.data.spec import Labels

FEWEST_ALONE = 5
"""Samples of a class that are drawn anew by themselves."""


def in_proportion(counts: NDArray[np.int64], number: int) -> Labels:
    """The classes of the first `number` samples: in the proportions of the real images, and nothing random about it.

    Samples are held against all real images: of other proportions, a perfect model would seem far off. Each sample is of the class
    that is furthest behind its share, so that any number of them from the first on has every class's share to within a few
    samples. Classes of one size come in turn.

    Args:
        counts: how many real images each class has, [classes].
    """
    total, owed = int(counts.sum()), np.zeros(len(counts), np.int64)
    labels = np.empty(number, np.int64)
    for sample in range(number):
        owed += counts
        labels[sample] = furthest = owed.argmax()
        owed[furthest] -= total
    return labels


def as_many_of_each(wanted: Labels, there: Labels) -> NDArray[np.int64]:
    """Places of `there` that hold as many of each class as `wanted` has: of each the first, and all where there are fewer."""
    classes = 1 + max(wanted.max(initial=0), there.max(initial=0))
    order = np.argsort(there, kind="stable")
    rank = np.empty(len(there), np.int64)
    rank[order] = np.arange(len(there)) - np.searchsorted(there[order], there[order])
    return np.flatnonzero(rank < np.bincount(wanted, minlength=classes)[there])


def beside(labels: Labels | None, samples: int, there: Labels) -> NDArray[np.int64]:
    """Places of the real images that stand beside samples: the first ones, of the same classes where samples have some."""
    return np.arange(min(samples, len(there))) if labels is None else as_many_of_each(labels, there)


def strata(labels: Labels) -> Labels:
    """The classes, those of few samples taken as one."""
    few = np.bincount(labels)[labels] < FEWEST_ALONE
    return np.where(few, labels.max() + 1, labels)


def resampled(rng: np.random.Generator, count: int, labels: Labels | None) -> NDArray[np.int64]:
    """Samples of a bootstrap draw: as many as there are, of each class as many as it has.

    How many samples a class has is no accident: a draw that left it to chance would find figures less sure than they are. But of
    a class with a sample or two, draws hardly differ, and figures would seem surer than they are: such classes are drawn as one.
    """
    if labels is None:
        return rng.integers(0, count, count)
    kinds = strata(labels)
    order = np.argsort(kinds, kind="stable")
    sizes = np.bincount(kinds)[kinds[order]]
    firsts = np.searchsorted(kinds[order], kinds[order])
    return order[firsts + (rng.random(count) * sizes).astype(np.int64)]


def shuffled(rng: np.random.Generator, count: int, labels: Labels | None) -> NDArray[np.int64]:
    """All samples in random order, in which the first of them, however many, have all classes in their proportions."""
    mixed = rng.permutation(count)
    if labels is None:
        return mixed
    places = np.empty(count)
    for label in np.unique(labels):
        own = mixed[labels[mixed] == label]
        places[own] = (np.arange(len(own)) + rng.random()) / len(own)
    return np.argsort(places, kind="stable")
