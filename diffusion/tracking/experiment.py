"""MLflow's experiment of all runs: made with its table and legend, found again, or said to be unusable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from diffusion.errors import TrackingError
from diffusion.presentation.legend import LEGEND_TITLE, legend
from diffusion.settings import Settings
from diffusion.tracking.connection import connect
from diffusion.tracking.pages import VIEW_TAG, shared_view

if TYPE_CHECKING:
    from mlflow.entities import Experiment

    from mlflow import MlflowClient

EXPERIMENT = "train-diffusion"
NOTE = "mlflow.note.content"
"""The tag that MLflow shows as description."""
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development", VIEW_TAG: shared_view(), NOTE: legend()}
"""The kind, so that its pages are those for training, and the table of runs that our links open."""


def open_tracking(environment: Settings) -> tuple[MlflowClient, str]:
    """A client of MLflow and the experiment of all runs. Raises TrackingError if MLflow does not answer."""
    client = connect(environment.tracking_uri)
    artifacts = environment.artifacts if environment.tracking_uri.startswith("sqlite") else None
    return client, open_experiment(client, artifacts)


def open_experiment(client: MlflowClient, artifacts: Path | None) -> str:
    """The id of the experiment that all runs belong to, made if it is not there.

    Args:
        artifacts: folder for artifacts where there is no server to keep them.

    Raises TrackingError if it was deleted, or its artifacts have no place that this machine sees.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        location = None
        if artifacts is not None:
            artifacts.mkdir(parents=True, exist_ok=True)
            location = artifacts.as_uri()
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=location, tags=EXPERIMENT_TAGS)
        except MlflowException:  # another run made it meanwhile
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    _check_usable(found)
    show_columns(client, found)
    note = found.tags.get(NOTE, "")
    if note != legend() and (
        not note or note.startswith(LEGEND_TITLE)
    ):  # an older one; not what somebody has written there
        client.set_experiment_tag(found.experiment_id, NOTE, legend())
    return found.experiment_id


def show_columns(client: MlflowClient, experiment: Experiment, figures: Sequence[str] = ()) -> None:
    """Have the experiment's table of runs show these metrics as well."""
    before = experiment.tags.get(VIEW_TAG)
    if (view := shared_view(before, figures)) != before:
        client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, view)


def _check_usable(experiment: Experiment) -> None:
    number, location = experiment.experiment_id, experiment.artifact_location
    if experiment.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow's experiment {EXPERIMENT} (id {number}) was deleted. Bring it back (mlflow experiments restore "
            f"--experiment-id {number}) and start again. To begin with an empty one, {_out_of_the_way(number)} after that."
        )
    parts = urlsplit(location)
    if parts.scheme in ("", "file"):
        folder = Path(unquote(parts.path))
        if not (folder.is_dir() or folder.parent.is_dir()):
            raise TrackingError(
                f"MLflow's experiment {EXPERIMENT} (id {number}) keeps its artifacts in {folder}, which this machine does not have: "
                "it was made on another one, or the folder was moved. Mount it or move it there, or "
                f"{_out_of_the_way(number)}: the next start makes a new one."
            )


def _out_of_the_way(number: str) -> str:
    return f"rename it (mlflow experiments rename --experiment-id {number} --new-name {EXPERIMENT}-old)"
