"""`make reproduce VERSION=3`: train a model version again from its recipe, and compare the weights bit for bit.

python -m flows.commands.reproduce --version 3 [--model eurosat-ddpm] | --run MLFLOW_RUN_ID   [--processes 2]

Nothing is checked out: it says whether code, dataset and recipe are those of the version, and trains with what is here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from diffusion.data.ingest import ingest
from diffusion.data.manifest import Manifest, find_dataset
from diffusion.data.sources import generated
from diffusion.data.sources.find import EUROSAT, GENERATED, find_archive, read_source
from diffusion.errors import DataError, TrackingError
from diffusion.features.identity import identify
from diffusion.jobs.specs import TrainingJob
from diffusion.recipe import Recipe
from diffusion.settings import Settings
from diffusion.store.objects import OBJECT_BYTES, Store, open_store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.version_tags import EARLIER_COMMITS, tags_of
from diffusion.training.state import CheckpointState, delete_checkpoint, load_state, steps_begun
from diffusion.trust.reading import parse_json, read_file
from flows.code import git_commit
from flows.commands.command import run_command
from flows.engines.gpus import gpus
from flows.engines.local import Local, usable_processes
from flows.launcher import Listener, run_job
from flows.request import checkpoint_every
from flows.run import job_fields

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mlflow import MlflowClient

MODEL = "eurosat-ddpm"
SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Original:
    """What a version says of itself."""

    name: str
    tags: dict[str, str]
    recipe: Recipe
    weights: str
    """sha256 of its weights."""


def main() -> int:
    """Train and compare. Returns 0 if the weights are the same, 1 if they are not or can't be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--version", type=int, help="number of the model version")
    which.add_argument("--run", help="id of the MLflow run that made it")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()

    def again(environment: Settings) -> int:
        client, _ = open_tracking(environment)
        original = read_version(client, find_version(client, arguments.model, arguments.version, arguments.run))
        with _ended_by_signals():
            return 0 if reproduce(original, environment, arguments.processes) else 1

    return run_command(again)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A lost terminal or a request to end raises SystemExit, so that what was made is removed; once, since that takes a while.

    Under nohup the terminal is of no concern.
    """
    heeded = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]

    def end(*_: object) -> None:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)
        sys.exit(1)

    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_version(client: MlflowClient, model: str, version: int | None, run: str | None) -> ModelVersion:
    """The version of that number, or the newest that a run made. Raises TrackingError if there is none."""
    query = f"run_id = '{run}'" if run else f"name = '{model}' and version_number = {version}"
    found = client.search_model_versions(query)
    if not found:
        raise TrackingError(f"MLflow has no model version with {query}. The model's page lists what there is.")
    return max(found, key=lambda one: int(one.version))


def read_version(client: MlflowClient, version: ModelVersion) -> Original:
    """The version's recipe and the digest of its weights. Raises TrackingError if its recipe is not the one it was tagged with."""
    import mlflow.artifacts

    name = f"{version.name} {version.version}"
    uri = f"models:/{version.name}/{version.version}/artifacts"

    def load(file: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            copy = mlflow.artifacts.download_artifacts(
                f"{uri}/{file}", dst_path=folder, tracking_uri=client.tracking_uri
            )
            return read_file(Path(copy), OBJECT_BYTES)

    try:
        text = load("recipe.json")
        # Of the file as it stands: today's recipes may have values that those of then had not.
        digest = hashlib.sha256(json.dumps(parse_json(text), sort_keys=True).encode()).hexdigest()
        tags = tags_of(version)
        if digest != tags["recipe.digest"]:
            raise TrackingError(
                f"The recipe that lies in {name} is not the one that it was tagged with: it was changed."
            )
        weights = hashlib.sha256(load("weights.safetensors")).hexdigest()
        original = Original(name, tags, Recipe.model_validate_json(text), weights)
        wanted = ("git.commit", "dataset.name", "dataset.digest", "checkpoint.digest", "checkpoint.step")
        int({tag: tags[tag] for tag in wanted}["checkpoint.step"])
    except (KeyError, ValueError, OSError) as error:
        raise TrackingError(
            f"{name} can't be reproduced: its tags or files are not those of a version of ours ({error})."
        ) from error
    return original


def reproduce(original: Original, environment: Settings, processes: int | None) -> bool:
    """Train it again, say what agrees, and return whether the weights do."""
    tags, recipe, store = original.tags, original.recipe, open_store(environment.store_uri)
    step = int(tags["checkpoint.step"])
    print(f"{original.name}: {recipe.name}, seed {recipe.seed}, {step:,} steps")
    commit = git_commit()
    earlier = tags.get(EARLIER_COMMITS, "")
    same = commit == tags["git.commit"] and commit != "unknown" and not commit.endswith("-dirty") and not earlier
    before = f", begun by {earlier}" if earlier else ""
    print(
        _line("code", same, f"commit {commit}" + ("" if same else f", the version's is {tags['git.commit']}{before}"))
    )
    dataset = _dataset(original, store, environment)
    print(_line("dataset", True, dataset.digest))
    print(_line("recipe", True, recipe.digest))
    if recipe.aligned_with is not None:  # before hours of training, if it is not there
        known = identify(recipe.aligned_with, store, dataset, None)
        print(_line("aligned with", True, f"{known.name}, sha256 {known.sha256}"))

    if reason := _may_differ(recipe, environment):
        print(f"{reason} If the weights differ, that may be all there is to it.", flush=True)

    run = f"reproduce-{uuid4().hex[:16]}"  # what an earlier reproduction made is no proof
    said = 0.0

    def say_progress(milestone: int, told: dict[str, Any]) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            print(
                f"   training to step {milestone:,}  {told['done']:,} of {told['total']:,} steps, {told['note']}",
                flush=True,
            )

    try:
        # From milestone to milestone, as the flow does it: the journal has a record at each.
        for milestone in recipe.milestones:
            job = TrainingJob(
                **job_fields(run, dataset, environment),
                recipe=recipe,
                until=milestone,
                checkpoint_every=checkpoint_every(recipe),
            )
            run_job(
                job.MODULE,
                job,
                environment.runs / run,
                usable_processes(recipe, processes),
                Listener(partial(say_progress, milestone)),
                Local().threads(recipe),
            )
        return compare(original, load_state(store, run, step))
    finally:
        for made in steps_begun(store, run):
            delete_checkpoint(store, run, made)
        shutil.rmtree(environment.runs / run, ignore_errors=True)


def _may_differ(recipe: Recipe, environment: Settings) -> str:
    """Why weights need not come out the same here, or nothing: said before hours of training."""
    if gpus() and not environment.deterministic:
        return "On a GPU only trainings with TRAIN_DIFFUSION_DETERMINISTIC=true, then and now, have the same bits."
    if recipe.reduction == "fast":
        return "By `reduction: fast` only trainings on the same number of processes have the same bits."
    return ""


def compare(original: Original, state: CheckpointState) -> bool:
    """Say what of a checkpoint is the original's, and return whether the weights are."""
    weights = original.weights in state.sha256.values()
    print(_line("weights", weights, original.weights if weights else "none of the new ones is the version's"))
    whole = state.digest == original.tags["checkpoint.digest"]
    print(
        _line(
            "checkpoint", whole, "optimiser, averages and journal as well" if whole else f"{state.digest}, not the same"
        )
    )
    return weights


def _dataset(original: Original, store: Store, environment: Settings) -> Manifest:
    found = find_dataset(store, original.tags["dataset.digest"])
    if found is None:
        known = {generated.NAME: GENERATED, "EuroSAT": EUROSAT}
        source = known.get(original.tags["dataset.name"])
        if source is None:
            raise DataError(
                f"The store {store.uri} no longer holds the dataset {original.tags['dataset.digest']}. Run the flow once with the "
                "source and options of then: it is ingested first."
            )
        found = ingest(read_source(source, find_archive(source, environment)), store)
    if found.digest != original.tags["dataset.digest"]:
        raise DataError(f"The images here are another dataset: {found.digest}, not {original.tags['dataset.digest']}.")
    return found


def _line(what: str, same: bool, text: str) -> str:
    return f"{what:>11}  {'same' if same else 'DIFFERENT':9}  {text}"


if __name__ == "__main__":
    sys.exit(main())
