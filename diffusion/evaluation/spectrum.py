"""How much power images have at each spatial frequency: a comparison that no feature extractor takes part in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.data.spec import Images, Labels
from diffusion.evaluation.labels import resampled
from diffusion.evaluation.statistics import BOOTSTRAP_DRAWS
from diffusion.randomness import stream

Powers = NDArray[np.float64]
"""[images, bands, rings]: mean power of an image's Fourier coefficients at 1, 2, … size / 2 cycles an image."""

REAL_IMAGES = 2000
"""Of each split, that are looked at."""
BLOCK_VALUES = 1 << 21  # that are transformed at once: 16 MB of levels, 32 of coefficients
FAINTEST = 1e-6  # of a band's mean power: what lies below it is rounding

SEED = 0


@dataclass(frozen=True)
class Spectra:
    """Of samples, and of real images of both splits."""

    samples: Powers
    train: Powers
    test: Powers
    """Of as many, and of the same classes, as the samples."""
    labels: Labels | None = None
    """The samples' classes."""


def powers(images: Images) -> Powers:
    """The azimuthally averaged power spectra of images [images, size, size, bands] (Durall et al. 2020, arXiv:2003.01826).

    A ring holds the frequencies whose distance from 0 rounds to its number. Summed over all frequencies, the power of a
    band is its mean square.
    """
    size, bands = images.shape[1], images.shape[3]
    frequencies = np.fft.fftfreq(size, 1 / size)
    ring = np.hypot(*np.meshgrid(frequencies, frequencies)).round().astype(int)
    rings = [np.flatnonzero(ring == radius) for radius in range(1, size // 2 + 1)]
    found = np.empty((len(images), bands, len(rings)))
    many = max(1, BLOCK_VALUES // (size * size * bands))
    for start in range(0, len(images), many):
        block = np.moveaxis(images[start : start + many].astype(np.float64), 3, 1)
        power = np.square(np.abs(np.fft.fft2(block))).reshape(len(block), bands, -1) / size**4
        for number, members in enumerate(rings):
            found[start : start + many, :, number] = power[:, :, members].mean(axis=2)
    return found


def first_powers(shards: Iterable[Images], count: int = REAL_IMAGES) -> Powers:
    """The spectra of the first images of shards, a shard at a time."""
    found: list[Powers] = []
    missing = count
    for images in shards:
        found.append(powers(images[:missing]))
        missing -= len(found[-1])
        if missing == 0:
            break
    return np.concatenate(found)


def distance(samples: Powers, real: Powers) -> float:
    """The root mean square, over bands and rings, of the difference of mean spectra in decibels; >= 0, 0 for equal ones."""
    a, b = samples.mean(axis=0), real.mean(axis=0)
    rounding = FAINTEST * b.mean(axis=1, keepdims=True) + np.finfo(np.float64).tiny
    return float(np.sqrt(np.square(10 * np.log10((a + rounding) / (b + rounding))).mean()))


def distance_error(samples: Powers, real: Powers, labels: Labels | None = None) -> float:
    """Standard deviation of the spectral distance over bootstrap draws of the samples, of each class as many as it has."""
    draws = []
    for draw in range(BOOTSTRAP_DRAWS):
        chosen = resampled(stream(SEED, "spectrum bootstrap", draw), len(samples), labels)
        draws.append(distance(samples[chosen], real))
    return float(np.std(draws, ddof=1))
