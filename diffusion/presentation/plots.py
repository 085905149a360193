"""Plots of a run."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.evaluation.figures import full_name, with_error
from diffusion.evaluation.scores import DEVIATIONS, BoundTerms, Scores
from diffusion.training.journal import LOG_SNR_BIN_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = 5


def _figure(left: float = 0.1, top: float = 0.92) -> tuple[Figure, Axes]:
    """A figure with one pair of axes at a fixed place: a layout that is found out would draw everything twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2))
    return figure, figure.add_axes((left, 0.13, 0.975 - left, top - 0.13))


def loss_by_noise_level(records: list[dict[str, Any]]) -> Figure:
    """The loss over log_snr, a curve for each fifth of the training so far, dark to light.

    records: those of the journal.
    """
    from matplotlib import colormaps

    rows = [record for record in records if record["kind"] == "metrics"]
    centres = (np.array(LOG_SNR_BIN_EDGES[:-1]) + np.array(LOG_SNR_BIN_EDGES[1:])) / 2
    figure, axes = _figure()
    parts = [part for part in np.array_split(np.arange(len(rows)), CURVES) if len(part)]
    for number, part in enumerate(parts):
        values = np.array([[np.nan if v is None else v for v in rows[i]["loss_by_log_snr"]] for i in part], dtype=float)
        seen = ~np.isnan(values).all(axis=0)
        curve = np.nanmean(values[:, seen], axis=0)
        colour = colormaps["viridis"](number / max(1, len(parts) - 1) * 0.9)
        label = f"steps {rows[part[0]]['step']:,}-{rows[part[-1]]['step']:,}"
        axes.plot(centres[seen], curve, marker="o", markersize=3, color=colour, label=label)
    axes.set(xlabel="log SNR (noise on the left, data on the right)", ylabel="loss", title="Loss by noise level")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def gradient_norms(records: list[dict[str, Any]]) -> Figure:
    """How large the gradient was before clipping, a histogram for the first and the second half of the training so far.

    records: those of the journal; each has the mean over its stretch.
    """
    norms = np.array([record["gradient_norm"] for record in records if record["kind"] == "metrics"])
    figure, axes = _figure()
    if len(norms):
        low, high = norms.min() * 0.95, norms.max() * 1.05
        bins = np.geomspace(max(low, 1e-12), high, 40).tolist()
        halves = [half for half in np.array_split(norms, 2) if len(half)]
        for half, label in zip(halves, ("first half", "second half"), strict=False):
            axes.hist(half, bins=bins, alpha=0.6, label=f"{label}, median {np.median(half):.3g}")
        axes.legend(fontsize=8)
    axes.set(xscale="log", xlabel="gradient norm before clipping", ylabel="records", title="Gradient norms")
    axes.grid(alpha=0.3)
    return figure


def fid_over_training(history: list[Scores]) -> Figure:
    """FID by the first extractor over the images seen, with its 95 % interval and the floor: the FID of real images."""
    figure, axes = _figure()
    seen, rows = [scores.images_seen for scores in history], [scores.require("fid") for scores in history]
    spread = [DEVIATIONS * (row.error or 0.0) for row in rows]
    axes.errorbar(seen, [row.value for row in rows], yerr=spread, marker="o", capsize=3)
    now = rows[-1]
    if now.real is not None:
        axes.axhline(now.real, color="C2", linestyle="--", label=f"real images: {now.real:.2f}")
    title = f"{full_name(now)} of {history[-1].samples:,} samples: {now.value:.1f} now (95 % interval)"
    axes.set(xlabel="images seen", ylabel=full_name(now), yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def as_png(figure: Figure) -> bytes:
    """The figure as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()


def bound_by_noise_level(bound: BoundTerms) -> Figure:
    """Where the bits of the variational bound come from: the prior, the transitions by log_snr, the decoder."""
    edges = np.array(bound.log_snr_edges)
    width = edges[1] - edges[0]
    figure, axes = _figure(top=0.8)
    axes.bar(edges[:-1], bound.transitions, width, align="edge", color="C0", edgecolor="white", label="transitions")
    axes.bar(edges[0] - width, bound.prior, width, color="C2", label=f"prior ({bound.prior:.4f})")
    axes.bar(edges[-1] + width, bound.decoder, width, color="C1", label=f"decoder ({bound.decoder:.3f})")
    timesteps = axes.secondary_xaxis("top")
    timesteps.set_xticks(edges[::4], [f"{t:,}" for t in bound.timestep_edges[::4]])
    timesteps.set_xlabel("timestep")
    title = f"{bound.total:.3f} ± {bound.error:.3f} bits/dim on {bound.images:,} test images"
    axes.set(xlabel="log SNR (noise on the left, data on the right)", ylabel="bits/dim", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def class_distances(scores: Scores) -> Figure:
    """FID of each class's samples, by the first extractor, worst on top."""
    fid, classes = scores.require("fid"), sorted(scores.parts("fid_of_class").items(), key=lambda item: item[1])
    figure, axes = _figure(left=0.25)
    bars = axes.barh([name for name, _ in classes], [fid for _, fid in classes], color="C0")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.margins(x=0.1)
    axes.set(xlabel=f"{full_name(fid)} of a class, of its share of {scores.samples:,} samples")
    for label in axes.get_yticklabels():
        label.set_parse_math(False)  # a class may be called $5_$
    axes.set_title(f"FID by class at step {scores.step:,}; of all together: {with_error(fid)}")
    axes.grid(axis="x", alpha=0.3)
    return figure
