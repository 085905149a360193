"""Figures of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

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
