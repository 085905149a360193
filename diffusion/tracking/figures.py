"""Figures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.evaluation.scores import BoundTerms, Scores
from diffusion.training.journal import LOG_SNR_BIN_EDGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CURVES = 5


def loss_by_noise_level(records: list[dict[str, Any]]) -> Figure:
    """The loss over log_snr, a curve for each fifth of the training so far, dark to light.

    records: those of the journal.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [record for record in records if record["kind"] == "metrics"]
    centres = (np.array(LOG_SNR_BIN_EDGES[:-1]) + np.array(LOG_SNR_BIN_EDGES[1:])) / 2
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
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


def bound_by_noise_level(bound: BoundTerms) -> Figure:
    """Where the bits of the variational bound come from: the prior, the transitions by log_snr, the decoder."""
    from matplotlib.figure import Figure

    edges = np.array(bound.log_snr_edges)
    width = edges[1] - edges[0]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(edges[:-1], bound.transitions, width, align="edge", color="C0", edgecolor="white", label="transitions")
    axes.bar(edges[0] - width, bound.prior, width, color="C2", label=f"prior ({bound.prior:.4f})")
    axes.bar(edges[-1] + width, bound.decoder, width, color="C1", label=f"decoder ({bound.decoder:.3f})")
    title = f"{bound.total:.3f} ± {bound.error:.3f} bits/dim on {bound.images:,} test images"
    axes.set(xlabel="log SNR (noise on the left, data on the right)", ylabel="bits/dim", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def class_distances(scores: Scores) -> Figure:
    """FID of each class's samples, by the first extractor, worst on top."""
    from matplotlib.figure import Figure

    by = scores.by_extractor[0]
    classes = sorted((by.class_fid or {}).items(), key=lambda item: item[1])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name for name, _ in classes], [fid for _, fid in classes], color="C0")
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set(xlabel=f"fid_{by.extractor} of a class (n = {by.samples // max(1, len(classes)):,} each)")
    axes.set_title(f"FID by class at step {scores.step:,}; of all together: {by.fid:.1f} ± {by.fid_error:.1f}")
    axes.grid(axis="x", alpha=0.3)
    return figure
