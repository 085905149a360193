"""The flow `clean-up`: deletes checkpoints and model versions that nothing live, recent or under way comes from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from diffusion.data.store import Store, open_store
from diffusion.errors import RunBusy
from diffusion.evaluation.comparison import evidence_name
from diffusion.job import lock_folder
from diffusion.settings import settings
from diffusion.tracking.promotion import past_champions
from diffusion.tracking.retention import find_superseded
from diffusion.training.state import delete_checkpoint, steps_begun
from flows.credentials import use_block
from flows.progress import say
from flows.run import FLOW_FOLDER, open_tracking

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mlflow import MlflowClient


@flow(name="clean-up")
def clean_up(
    keep_runs: Annotated[int, Field(ge=1)] = 30,
    keep_versions: Annotated[int, Field(ge=1)] = 30,
    keep_champions: Annotated[int, Field(ge=0)] = 10,
    dry_run: bool = False,
) -> list[str]:
    """Delete superseded checkpoints and model versions. Never those of a version with an alias, or what it went on from.

    Args:
        keep_runs: The newest runs whose checkpoints are kept.
        keep_versions: The newest versions of each model that are kept.
        keep_champions: The last champions of each model that are kept, for a way back.
        dry_run: Only say what would be deleted.
    """
    environment = settings()
    use_block(environment.s3_block)
    client, experiment_id = open_tracking(environment)
    store = open_store(environment.store_uri)
    champions = past_champions(store, keep_champions)
    found = find_superseded(client, experiment_id, keep_runs, keep_versions, champions)
    done = []
    for run in found.runs:
        steps = steps_begun(store, run)
        if not dry_run and not _delete_run(store, run, steps, environment.runs / run):
            say(f"{run} is being continued: its checkpoints are left.")
        elif steps:
            done.append(f"checkpoints of {run}: {', '.join(f'{step:,}' for step in steps)}")
    for model, version in found.versions:
        now = client.get_model_version(model, version)
        if now.aliases:  # given meanwhile
            continue
        done.append(f"version {version} of {model}")
        if not dry_run:
            _delete_version(client, now)
    heading = f"{'Would be deleted' if dry_run else 'Deleted'}: {len(done)}"
    say(heading)
    create_markdown_artifact("\n".join([f"# {heading}", "", *(f"- {line}" for line in done)]) + "\n", key="clean-up")
    return done


def _delete_version(client: MlflowClient, version: ModelVersion) -> None:
    """Delete a version, and first the files of its model, which MLflow would leave: what breaks off is done by the next clean-up."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    model = client.get_logged_model(version.source.removeprefix("models:/"))  # the registry keeps no `model_id`
    get_artifact_repository(model.artifact_location).delete_artifacts()
    client.delete_model_version(version.name, str(version.version))
    client.delete_logged_model(model.model_id)


def _delete_run(store: Store, run: str, steps: list[int], folder: Path) -> bool:
    """Delete a run's checkpoints and its working folder here, unless a flow run has taken it up meanwhile."""
    try:
        lock = lock_folder(folder / FLOW_FOLDER, seconds=0)
    except RunBusy:
        return False
    with lock:
        for step in steps:
            delete_checkpoint(store, run, step)
            store.delete(evidence_name(run, step))
        shutil.rmtree(folder, ignore_errors=True)
    return True


if __name__ == "__main__":
    clean_up()
