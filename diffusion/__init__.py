"""The library: data, process, network, training, evaluation and tracking of diffusion models. No orchestration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.tracking.loading import Model


def load(name: str) -> Model:
    """A registered model, `eurosat-ddpm@champion` or `eurosat-ddpm/3`, from the MLflow server of MLFLOW_TRACKING_URI.

    `load(…).draw(16, "River")` gives pictures; `predict` is MLflow's.

    Loading runs the code of the version; here only after its files have been found to be those that its run has made. Raises
    TrackingError otherwise.
    """
    from diffusion.settings import settings
    from diffusion.tracking.loading import load_version

    return load_version(name, settings())
