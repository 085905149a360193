"""What the metrics mean and in which unit they are, in the order in which to read them."""

from __future__ import annotations

from collections.abc import Iterator

METRICS: dict[str, dict[str, str]] = {
    "score": {
        "fid": "Fréchet distance of samples to training images; squared units of the extractor's features; lower is better",
        "bits_per_dim": "variational bound on test images; bits a subpixel; lower is better",
        "kid": "kernel distance of samples to training images; no unit; lower is better",
        "fid_worst_class": "the highest FID of any class: of a tenth of the samples, so higher than `fid`",
        "precision": "share of samples that lie among real images; 0 to 1",
        "recall": "share of real images that lie among samples; 0 to 1",
        "class_accuracy": "share of samples that the classifier takes for their class; 0 to 1",
        "memorisation": "samples very close to training images, for each new real image that is; 1 is right, 20 all copies",
    },
    "score_detail": {
        "fid_error": "standard error",
        "fid_extrapolated": "of infinitely many samples",
        "fid_floor": "of as many real test images",
        "bits_per_dim_error": "standard error",
        "kid_error": "standard error",
        "kid_floor": "of as many real test images",
        "density": "how many neighbourhoods of real images a sample lies in, over five; about 1",
        "coverage": "share of real images that have a sample near; 0 to 1",
        "memorisation_error": "standard error",
    },
    "train": {
        "loss": "mean over the steps since the point before; in images of variance one; lower is better",
        "gradient_norm": "before clipping; mean over the steps since the point before",
        "learning_rate": "at that step",
    },
    "speed": {
        "images_per_second": "of all processes together",
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


def legend() -> str:
    """All of it as Markdown, for the experiment's page."""
    return "\n".join(["Metrics, in the order in which to read them.", "", *_rows()])


def _rows() -> Iterator[str]:
    yield "| metric | meaning |"
    yield "| --- | --- |"
    for section, metrics in METRICS.items():
        for name, meaning in metrics.items():
            yield f"| {section}/{name} | {meaning} |"
