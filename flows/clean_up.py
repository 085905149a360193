"""The flow `clean-up`: deletes checkpoints and model versions that nothing live, recent or under way comes from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from diffusion.errors import RunBusy
from diffusion.jobs.lock import lock_folder
from diffusion.settings import settings
from diffusion.store import layout
from diffusion.store.objects import FolderStore, Store, open_store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.promotion_log import past_champions
from diffusion.tracking.retention import find_superseded
from diffusion.training.state import checkpoint_names, steps_begun
from diffusion.trust.private import use_private_home
from diffusion.trust.redaction import redact_logs, shown
from flows.owner import FLOW_FOLDER
from flows.plugins.credentials import use_block
from flows.progress import say
from flows.slot import keep_slots

if TYPE_CHECKING:
    from mlflow import MlflowClient

keep_slots()


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
        dry_run: Only say what would be deleted, path by path.
    """
    environment = settings()
    use_private_home(environment.home)
    redact_logs()
    use_block(environment.s3_block)
    client, experiment_id = open_tracking(environment)
    store = open_store(environment.store_uri)
    champions = past_champions(store, keep_champions)
    found = find_superseded(client, experiment_id, keep_runs, keep_versions, champions)
    # First all that is to go is listed, path by path: nothing else is ever deleted.
    runs = [run_remains(store, run, environment.runs / run) for run in found.runs]
    root = str(client.get_experiment(experiment_id).artifact_location)
    versions = [version_remains(client, name, number, root, environment.artifacts) for name, number in found.versions]
    done: list[str] = []
    for run in runs:
        paths = run.paths(store.uri)
        if dry_run or delete_run(store, run):
            done += paths
        else:
            say(f"{run.key} is being continued: its checkpoints are left.")
    for version in filter(None, versions):
        if client.get_model_version(version.name, version.number).aliases:  # given meanwhile
            continue
        done += version.paths()
        if not dry_run:
            delete_version(client, version)
    for path in store.unfinished() if isinstance(store, FolderStore) else ():
        done.append(str(path))
        if not dry_run:
            path.unlink(missing_ok=True)
    heading = f"{'Would be deleted' if dry_run else 'Deleted'}: {len(done)}"
    say(heading)
    create_markdown_artifact("\n".join([f"# {heading}", "", *(f"- `{line}`" for line in done)]) + "\n", key="clean-up")
    return done


@dataclass(frozen=True)
class RunRemains:
    """What is left of a run that nothing needs."""

    key: str
    objects: tuple[str, ...]
    """Names in the store, in the order in which they are deleted: a checkpoint's state is the first of its files."""
    folder: Path
    """Its working folder on this machine."""

    def paths(self, store: str) -> list[str]:
        """All of it, for people."""
        return [*(f"{store}/{name}" for name in self.objects), *([f"{self.folder}/"] if self.folder.exists() else [])]


def run_remains(store: Store, run: str, folder: Path) -> RunRemains:
    """Look up what a run has left."""
    checkpoints = [name for step in steps_begun(store, run) for name in checkpoint_names(store, run, step)]
    # MLflow has its pictures as well. The scores stay: by them a version that is kept is judged.
    evaluated = [name for name in store.names(layout.evaluations(run)) if not name.endswith("/scores.json")]
    return RunRemains(run, (*checkpoints, *evaluated), folder)


def delete_run(store: Store, run: RunRemains) -> bool:
    """Delete what is listed, unless a flow run has taken the run up meanwhile. Returns whether it did."""
    existed = run.folder.exists()
    try:
        lock = lock_folder(run.folder / FLOW_FOLDER, seconds=0)
    except RunBusy:
        return False
    with lock:
        for name in run.objects:
            store.delete(name)
        shutil.rmtree(run.folder, ignore_errors=not existed)
    return True


@dataclass(frozen=True)
class VersionRemains:
    """A model version that nothing needs."""

    name: str
    number: str
    model_id: str
    location: str
    """Where its files lie."""

    def paths(self) -> list[str]:
        """All of it, for people."""
        return [f"version {self.number} of {self.name}", self.location]


def version_remains(client: MlflowClient, name: str, number: str, root: str, local: Path) -> VersionRemains | None:
    """Look up a version's files; None, and a word, if they lie where none of ours do: MLflow's database may say any path.

    Args:
        root: where the experiment's artifacts lie.
        local: the folder on this machine that artifacts may lie in.
    """
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version(name, number)
        model = client.get_logged_model(version.source.removeprefix("models:/"))  # the registry keeps no `model_id`
    except MlflowException as error:  # somebody has deleted a part of it
        say(f"Version {number} of {shown(name)} is left: MLflow does not find all of it ({error.error_code}).")
        return None
    location = str(model.artifact_location)
    path = urlsplit(location).path
    inside = location.startswith(f"{root.rstrip('/')}/") and ".." not in path.split("/")
    if urlsplit(location).scheme in ("", "file"):
        inside = inside and Path(unquote(path)).resolve().is_relative_to(local.resolve())
    if not inside:
        say(f"Version {number} of {shown(name)} is left: its files lie at {shown(location)}, where none of ours do.")
        return None
    return VersionRemains(name, number, model.model_id, location)


def delete_version(client: MlflowClient, version: VersionRemains) -> None:
    """Delete a version, and first the files of its model, which MLflow would leave: what breaks off is done by the next clean-up."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    get_artifact_repository(version.location).delete_artifacts()
    client.delete_model_version(version.name, version.number)
    client.delete_logged_model(version.model_id)


if __name__ == "__main__":
    clean_up()
