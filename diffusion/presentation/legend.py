"""What the metrics mean and in which unit they are, in the order in which to read them."""

from __future__ import annotations

from diffusion.evaluation.figures import FIGURES
from diffusion.presentation.markdown import markdown_table

METRICS: dict[str, dict[str, str]] = {
    "score": {one.name: one.legend for one in FIGURES.values() if one.place in ("headline", "score")},
    "score_detail": {
        **{one.name: one.legend for one in FIGURES.values() if one.place == "detail"},
        "…_error": "standard error of the figure that is named first",
        "…_floor": "the figure of as many real test images",
    },
    "train": {
        "loss": "mean over the steps since the point before; in images of variance one; lower is better",
        "gradient_norm": "before clipping; mean over the steps since the point before",
        "learning_rate": "at that step",
    },
    "speed": {
        "images_per_second": "of all processes together",
        "model_flops_utilisation": "what the network computes, as a share of what a product of large matrices reaches; 0 to 1",
        "data_wait_share": "share of the time that is spent waiting for data; 0 to 1",
        "peak_memory_mib": "of the first process (on a GPU: of the GPU's memory); MiB",
    },
    "system": {
        "cpu_utilization_percentage": "of the machine; %",
        "system_memory_usage_megabytes": "of the machine; MB",
        "gpu_utilization_percentage": "of each GPU; %",
    },
}
"""Section of the pages, metric, meaning. What depends on an extractor has its name at the end: `fid_eurosat`."""


LEGEND_TITLE = "Metrics, in the order in which to read them."


def legend() -> str:
    """All of it as Markdown, for the experiment's page."""
    rows = ((f"{section}/{name}", meaning) for section, names in METRICS.items() for name, meaning in names.items())
    return f"{LEGEND_TITLE}\n\n" + markdown_table(("metric", "meaning"), rows) + "\n"
