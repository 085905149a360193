"""The figures: what each is called, what it means, and how it is computed. Whoever shows figures reads this table.

A new figure is a function here, under the row of the table that says what it is. Scores that were made before it lack it, and compare
by what they have. No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffusion.evaluation.reference import Reference
from diffusion.evaluation.scores import DEVIATIONS, BoundTerms, Row, Scores
from diffusion.evaluation.spectrum import Spectra, distance, distance_error
from diffusion.evaluation.statistics import (
    Manifold,
    Memorisation,
    Moments,
    frechet_distance,
    frechet_error,
    frechet_extrapolated,
    kernel_distance,
    manifold,
    nearest_copies,
)

TELLING = ("fid", "bits_per_dim")
"""The figures that tell models apart where there is room for few."""
Place = Literal["headline", "score", "detail", "table"]
"""How far to the front a figure stands: in a report's first lines; under `score/` in MLflow; under `score_detail/`; only in
the table of all figures. What stands further in front stands behind as well."""


@dataclass(frozen=True)
class Value:
    """What was measured."""

    value: float
    error: float | None = None
    """Its standard error."""
    real: float | None = None
    """The same of real test images, of as many of each class as there are samples of, where there are so many."""


Measured = Value | Mapping[str, Value] | None
"""One value; several by name, where a figure has parts; None where it means nothing."""


@dataclass(frozen=True)
class Features:
    """What the figures of one extractor are computed from."""

    samples: NDArray[np.float32]
    """[samples, dimensions]"""
    labels: NDArray[np.int64] | None
    """The samples' classes."""
    reference: Reference
    classes: tuple[str, ...]
    classify: Callable[[NDArray[np.float32]], NDArray[np.int64]] | None
    """The class of features, where the extractor knows the classes."""
    real: NDArray[np.float32]
    """Of the real test images that stand beside the samples: as many, and of the same classes, as far as there are such."""
    real_labels: NDArray[np.int64] | None
    """Their classes, where the samples have some."""

    @cached_property
    def cover(self) -> Manifold:
        """How samples and training images cover one another."""
        return manifold(self.reference.train_features, self.samples)

    @cached_property
    def copies(self) -> Memorisation:
        """How near samples lie to training images."""
        return nearest_copies(self.reference.train_features, self.reference.test_features, self.samples)

    @cached_property
    def class_distances(self) -> dict[str, float]:
        """FID of each class that has samples against its real images."""
        found: dict[str, float] = {}
        for label, name in enumerate(self.classes if self.labels is not None else ()):
            own = self.samples[self.labels == label]
            real = self.reference.train_features[self.reference.train_labels == label]
            if len(own) > 1 and len(real) > 1:
                found[name] = frechet_distance(Moments.of(own), Moments.of(real))
        return found


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    meaning: str
    unit: str
    better: str
    """Which values are."""
    place: Place
    digits: int
    """Behind the point, where people read it."""
    subject: type
    """What it is computed from: Features (once for each extractor), Spectra, or BoundTerms."""
    measure: Callable[[Any], Measured]
    always: float | None
    """What new real images have, where that needs no measuring."""

    @property
    def legend(self) -> str:
        """What it means, its unit, and which values are better, in a line."""
        return f"{self.meaning}; {self.unit}; {self.better}"


FIGURES: dict[str, Figure] = {}
"""All of them by name, in the order in which to read them."""

Subject = TypeVar("Subject", Features, Spectra, BoundTerms)


def figure(
    subject: type[Subject], unit: str, better: str, place: Place, digits: int, always: float | None = None
) -> Callable[[Callable[[Subject], Measured]], Callable[[Subject], Measured]]:
    """Make a row of the function below: its name is the figure's, and what it says of itself is what the figure means."""

    def enter(measure: Callable[[Subject], Measured]) -> Callable[[Subject], Measured]:
        name, meaning = measure.__name__, (measure.__doc__ or "").rstrip(".")
        FIGURES[name] = Figure(name, meaning, unit, better, place, digits, subject, measure, always)
        return measure

    return enter


LOWER, HIGHER = "lower is better", "higher is better"


@figure(Features, "squared units of the extractor's features", LOWER, "headline", digits=2)
def fid(features: Features) -> Value:
    """Fréchet distance of samples to training images."""
    train = features.reference.train
    return Value(
        frechet_distance(Moments.of(features.samples), train),
        frechet_error(features.samples, train, features.labels),
        frechet_distance(Moments.of(features.real), train),
    )


@figure(BoundTerms, "bits a subpixel", LOWER, "headline", digits=3)
def bits_per_dim(bound: BoundTerms) -> Value:
    """Variational bound on test images."""
    return Value(bound.total, bound.error)


@figure(Features, "no unit", LOWER, "headline", digits=4)
def kid(features: Features) -> Value:
    """Kernel distance of samples to training images."""
    train = features.reference.train_features
    return Value(
        *kernel_distance(features.samples, train, labels=features.labels),
        kernel_distance(features.real, train, labels=features.real_labels)[0],
    )


@figure(Features, "as `fid`", LOWER, "score", digits=2)
def fid_worst_class(features: Features) -> Value | None:
    """The highest FID of any class: of the samples of that class alone, so higher than `fid`."""
    return Value(max(features.class_distances.values())) if features.class_distances else None


@figure(Features, "0 to 1", HIGHER, "score", digits=3)
def precision(features: Features) -> Value:
    """Share of samples that lie among real images."""
    return Value(features.cover.precision)


@figure(Features, "0 to 1", HIGHER, "score", digits=3)
def recall(features: Features) -> Value:
    """Share of real images that lie among samples."""
    return Value(features.cover.recall)


@figure(Features, "0 to 1", HIGHER, "score", digits=3)
def class_accuracy(features: Features) -> Value | None:
    """Share of samples that the extractor, a classifier, takes for their class."""
    if features.labels is None or features.classify is None:
        return None
    return Value(float((features.classify(features.samples) == features.labels).mean()))


@figure(Features, "a ratio", "1 is right, more are copies", "score", digits=2, always=1.0)
def memorisation(features: Features) -> Value:
    """Samples very close to training images, for each new real image that is."""
    return Value(features.copies.ratio, features.copies.error)


@figure(Spectra, "decibels", LOWER, "score", digits=2)
def spectral_distance(spectra: Spectra) -> Value:
    """Difference of samples' mean power spectrum from training images'; no extractor takes part."""
    return Value(
        distance(spectra.samples, spectra.train),
        distance_error(spectra.samples, spectra.train, spectra.labels),
        distance(spectra.test, spectra.train),
    )


@figure(Features, "as `fid`", LOWER, "detail", digits=2)
def fid_extrapolated(features: Features) -> Value:
    """`fid` of infinitely many samples."""
    return Value(frechet_extrapolated(features.samples, features.reference.train, features.labels))


@figure(Features, "a number", "about 1", "detail", digits=3)
def density(features: Features) -> Value:
    """How many neighbourhoods of real images a sample lies in, over five."""
    return Value(features.cover.density)


@figure(Features, "0 to 1", HIGHER, "detail", digits=3)
def coverage(features: Features) -> Value:
    """Share of real images that have a sample near."""
    return Value(features.cover.coverage)


@figure(BoundTerms, "bits a subpixel", LOWER, "table", digits=3)
def bits_of_term(bound: BoundTerms) -> Mapping[str, Value]:
    """The parts of the variational bound."""
    terms = {"prior": bound.prior, "transitions": sum(bound.transitions), "decoder": bound.decoder}
    return {name: Value(bits) for name, bits in terms.items()}


@figure(Features, "as `fid`", LOWER, "table", digits=2)
def fid_of_class(features: Features) -> Mapping[str, Value]:
    """FID of each class's samples against its real images: n a class is a fraction, so higher than `fid`."""
    return {name: Value(value) for name, value in features.class_distances.items()}


def measured(subject: Features | Spectra | BoundTerms, extractor: str | None = None) -> list[Row]:
    """The rows of all figures that are computed from this; of that extractor, where it is of features."""
    rows = []
    for one in FIGURES.values():
        if isinstance(subject, one.subject):
            found = one.measure(subject)
            parts = found if isinstance(found, Mapping) else {None: found}
            for part, value in parts.items():
                if value is not None:
                    real = value.real if one.always is None else one.always
                    rows.append(
                        Row(
                            figure=one.name,
                            extractor=extractor,
                            part=part,
                            value=value.value,
                            error=value.error,
                            real=real,
                        )
                    )
    return rows


def in_order(scores: Scores) -> list[tuple[Figure, Row]]:
    """The rows with what they mean, in the order in which to read them; without figures that are no more."""
    return [(one, row) for one in FIGURES.values() for row in scores.rows if row.figure == one.name]


def of_how_many(one: Figure, scores: Scores) -> str:
    """What a figure was measured on."""
    if one.subject is BoundTerms and scores.bound is not None:
        return f"{scores.bound.images:,} test images"
    return f"n = {scores.samples:,}"


def full_name(row: Row) -> str:
    """As MLflow and the cards have it: an extractor's name is part of its figures' names."""
    return row.figure if row.extractor is None else f"{row.figure}_{row.extractor}"


def metrics(scores: Scores) -> dict[str, float]:
    """MLflow metrics: few under `score/`; the rest, with errors and what real images have, under `score_detail/`."""
    flat = {}
    for one, row in in_order(scores):
        if one.place == "table":
            continue
        flat[f"{'score_detail' if one.place == 'detail' else 'score'}/{full_name(row)}"] = row.value
        more = {"error": row.error, "floor": row.real if one.always is None else None}
        for key, value in more.items():
            if value is not None:
                flat[f"score_detail/{full_name(row.model_copy(update={'figure': f'{one.name}_{key}'}))}"] = value
    return flat


def telling_metrics(scores: Scores) -> list[str]:
    """The metrics that tell runs apart, each before its error, if it has one."""
    names = []
    for one, row in in_order(scores):
        if one.name in TELLING:
            names.append(f"score/{full_name(row)}")
            if row.error is not None:
                names.append(f"score_detail/{full_name(row.model_copy(update={'figure': f'{one.name}_error'}))}")
    return names


def number(value: float | None) -> str:
    """A figure for people; nothing for None."""
    return "" if value is None else f"{value:.4g}"


def table(scores: Scores) -> list[tuple[str, float, float | None, float | None]]:
    """All figures: name, value, standard error, and what real test images have. None where there is none."""
    rows = []
    for one, row in in_order(scores):
        name = full_name(row) if row.part is None else f"{full_name(row)}, {row.part}"
        rows.append((f"{name} ({of_how_many(one, scores)})", row.value, row.error, row.real))
    return rows


def with_error(row: Row) -> str:
    """A value and its standard error, as people read them."""
    digits = FIGURES[row.figure].digits
    return f"{row.value:.{digits}f}" + ("" if row.error is None else f" ± {row.error:.{digits}f}")


def headline(scores: Scores) -> str:
    """The few figures that are looked at first, with their errors."""
    return ", ".join(f"{full_name(row)} {with_error(row)}" for one, row in in_order(scores) if one.place == "headline")


def with_interval(row: Row) -> str:
    """A value and its 95 % interval, as people read them."""
    digits = FIGURES[row.figure].digits
    if row.error is None:
        return f"{row.value:.{digits}f}"
    low, high = (row.value + side * DEVIATIONS * row.error for side in (-1, 1))
    return f"{row.value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
