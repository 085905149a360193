"""What a version must show to go live: conditions, each with the figures that it was judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from diffusion.evaluation.comparison import Comparison, Difference
from diffusion.evaluation.figures import FIGURES, full_name, with_error
from diffusion.evaluation.scores import DEVIATIONS, Scores
from diffusion.presentation.markdown import markdown_table

COLLAPSE = 1.5
"""A class whose FID is more than this many times the champion's has collapsed, unless that may be luck."""
VARIATION = 0.05
"""Of the first version, a class that varies less than this share of what its real images do has collapsed: one picture for all."""
NO_COLLAPSE = "no class has collapsed"
OfClass = Callable[[str], Difference | None]


@dataclass(frozen=True)
class Gate:
    """One condition of a promotion."""

    name: str
    passed: bool
    figures: str


@dataclass(frozen=True)
class Margins:
    """How clear a difference from the champion must be."""

    fid: float = 0.0
    """How far below the champion's the FID must lie: the whole interval of the difference lies below minus this."""
    bits_per_dim: float = 0.01
    """How far above the champion's the bound may lie: the interval of the difference reaches below this."""
    first: float = 1.0
    """Of the first version: its FID lies, beyond doubt, below this share of the spread of real features. One picture, drawn over and
    over, has all of it or more: without a covariance of its own, FID is at least the trace of that of the real ones."""


DEFAULT_MARGINS = Margins()


def gates_against(
    new: Scores,
    old: Scores,
    comparison: Comparison,
    margins: Margins = DEFAULT_MARGINS,
    of_class: OfClass = lambda name: None,
) -> tuple[Gate, ...]:
    """What a challenger must show against the champion, both scored under one protocol.

    Args:
        of_class: a class's FID over the champion's, with its interval; None where there are too few samples to judge.
    """
    by = new.extractors[0].name
    fid, bits, close = comparison.fid, comparison.bits_per_dim, comparison.memorisation
    gates = [
        Gate(
            f"fid_{by} is lower",
            fid.high < -margins.fid,
            f"{_both(new, old, 'fid')} over {new.samples:,} samples: {_text(fid, 2)}, corrected for what finitely many "
            f"samples add" + (f"; asked for: below {-margins.fid:g}" if margins.fid else ""),
        ),
    ]
    if bits is not None:
        gates.append(
            Gate(
                "bits_per_dim is not higher",
                bits.low <= margins.bits_per_dim,
                f"{_both(new, old, 'bits_per_dim')}: {_text(bits, 3)}; allowed: {margins.bits_per_dim:g}",
            )
        )
    before = old.parts("fid_of_class")
    worst = {name: fid / before[name] for name, fid in new.parts("fid_of_class").items() if before.get(name)}
    if worst:
        gates.append(_no_collapse(worst, of_class))
    gates.append(
        Gate(
            # Below 1, samples are further from the training images than new real ones are: blurred, not better.
            "nothing more is copied",
            close.low <= 0 or not_memorised(new),
            f"memorisation {_both(new, old, 'memorisation')} (new real images: 1): {_text(close, 2)}; it must not be above both",
        )
    )
    return tuple(gates)


def _no_collapse(ratios: Mapping[str, float], of_class: OfClass) -> Gate:
    """Whether no class's FID is clearly more than `COLLAPSE` times the champion's."""
    suspects = sorted((name for name in ratios if ratios[name] > COLLAPSE), key=lambda name: -ratios[name])
    name = max(ratios, key=lambda key: ratios[key])
    interval, collapsed = of_class(name), False
    for suspect in suspects:  # up to the first that has: with large features, each takes minutes
        found = interval if suspect == name else of_class(suspect)
        if found is not None and found.low > 1:
            name, interval, collapsed = suspect, found, True
            break
    said = f"({interval.low:.2f} to {interval.high:.2f}, 95 %)" if interval else "(of too few samples to judge)"
    return Gate(NO_COLLAPSE, not collapsed, f"the FID of {name} is {ratios[name]:.2f} times the champion's {said}")


def _both(new: Scores, old: Scores, figure: str) -> str:
    digits = FIGURES[figure].digits
    return f"{new.require(figure).value:.{digits}f} against {old.require(figure).value:.{digits}f}"


def _text(difference: Difference, digits: int) -> str:
    return f"a difference of {difference.low:.{digits}f} to {difference.high:.{digits}f} (95 %)"


def gates_alone(
    new: Scores,
    bits_of_no_model: float,
    spread: float,
    variation: Mapping[str, float] = MappingProxyType({}),
    margins: Margins = DEFAULT_MARGINS,
) -> tuple[Gate, ...]:
    """What the first version ever must show.

    Args:
        spread: the total variance of the real images' features.
        variation: by class, what its samples vary as a share of what its real images do.
    """
    fid, bits, copies = new.require("fid"), new.find("bits_per_dim"), new.require("memorisation")
    likely = []
    if bits is not None:
        likely = [
            Gate(
                "bits_per_dim is below that of no model",
                bits.value < bits_of_no_model,
                f"{bits.value:.3f}; an even guess has {bits_of_no_model:g}",
            )
        ]
    varied = []
    if variation:
        name = min(variation, key=lambda key: variation[key])
        figures = f"{name} varies least: {variation[name]:.0%} of what its real images do; asked for: {VARIATION:.0%}"
        varied = [Gate(NO_COLLAPSE, variation[name] >= VARIATION, figures)]
    return (
        Gate(
            f"{full_name(fid)} is below that of one picture for all",
            fid.value + DEVIATIONS * (fid.error or 0.0) < margins.first * spread,
            f"{with_error(fid)} over {new.samples:,} samples; one picture, drawn over and over, has at least {spread:.2f}"
            + (f"; asked for: {margins.first:g} times that" if margins.first != 1 else ""),
        ),
        *likely,
        *varied,
        Gate(
            "nothing is copied",
            not_memorised(new),
            f"memorisation {with_error(copies)} (new real images: 1)",
        ),
    )


def not_memorised(scores: Scores) -> bool:
    """Whether samples are no nearer to training images than new real images are, as far as can be told.

    Of new images the figure has mean 1 and this error, and the long tail of a gamma variable where images are few: its quantile is
    that of Wilson & Hilferty 1931 (https://doi.org/10.1073/pnas.17.12.684).
    """
    copies = scores.require("memorisation")
    error = copies.error or 0.0
    return copies.value <= (1 - error**2 / 9 + DEVIATIONS * error / 3) ** 3


def gates_table(gates: tuple[Gate, ...]) -> str:
    """The gates of a decision as Markdown."""
    rows = ((gate.name, "yes" if gate.passed else "**no**", gate.figures) for gate in gates)
    return markdown_table(("gate", "passed", "figures"), rows)
