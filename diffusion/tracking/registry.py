"""Model versions: publishing one with its lineage."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusion
from diffusion.data.manifest import Manifest, find_dataset
from diffusion.data.spec import ImageSpec
from diffusion.errors import DataError
from diffusion.evaluation.figures import headline, metrics
from diffusion.evaluation.protocol import protocol
from diffusion.evaluation.scores import Scores
from diffusion.features.identity import find_own
from diffusion.presentation.card import Card
from diffusion.presentation.markdown import fit_description
from diffusion.store.objects import Store
from diffusion.tracking.connection import patient_with_files
from diffusion.tracking.loading import FILES_TAG, files_digest
from diffusion.tracking.promotion import champion_version
from diffusion.tracking.retention import LOGGED_MODEL
from diffusion.tracking.run import TrackedRun
from diffusion.tracking.scores_tag import TAG as SCORES
from diffusion.tracking.scores_tag import scores_tags
from diffusion.tracking.version_tags import tags_of, with_lineage
from diffusion.training.state import CheckpointState, checkpoint_file
from diffusion.trust.private import close_to_others

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mlflow import MlflowClient

ASSETS = Path(diffusion.__file__).resolve().parent.parent / "mlflow"
"""`mlflow/` of the project: files that MLflow takes by path."""
REQUIREMENTS = ("torch", "numpy", "pillow", "tifffile", "pydantic", "pyyaml", "safetensors")
INPUT_EXAMPLE: tuple[list[Any], dict[str, Any]] = ([], {"n": 4, "steps": 20, "seed": 0, "format": "png"})
"""A request: the model takes no input, only parameters."""


def model_name(client: MlflowClient, store: Store, dataset: Manifest, image_size: int) -> str:
    """The registered model of a dataset: models of `EuroSAT` are `eurosat-ddpm`, and others never compete with them.

    Where its champion can't be scored by these images, there is a second one: `eurosat-ddpm-64` for another size, and for other
    bands, levels or classes one with the beginning of their digest, `eurosat-ddpm-1f0c9ab2`.
    """
    name = f"{dataset.source.lower()}-ddpm"
    champion = champion_version(client, name)
    if champion is not None and tags_of(champion).get("image_size", str(image_size)) != str(image_size):
        name = f"{name}-{image_size}"
        champion = champion_version(client, name)
    kind = dataset.images.kind
    other = champion is not None and _kind_of(store, tags_of(champion).get("dataset.digest", "")) not in (None, kind)
    return f"{name}-{kind[:8]}" if other else name


def _kind_of(store: Store, digest: str) -> str | None:
    """Of the images of a dataset; None where it is gone. Raises StoreError if the store does not answer."""
    if not re.fullmatch("[0-9a-f]{64}", digest):  # a tag, which may name anything
        return None
    try:
        found = find_dataset(store, digest)
    except DataError:
        return None
    return found.images.kind if found else None


@dataclass(frozen=True)
class Candidate:
    """What becomes a model version."""

    state: CheckpointState
    """Of the checkpoint."""
    scores: Scores
    dataset: Manifest
    pictures: dict[str, bytes]
    """PNGs by name: `grid`, samples, and `closest`, the samples nearest to training images."""
    tags: dict[str, str]
    """Where it came from: `git.commit`, `prefect.flow_run_id`."""
    compute: str
    """What the training took, for the card."""


def publish(run: TrackedRun, store: Store, made: Candidate) -> tuple[str, str]:
    """Make a model version of a checkpoint, and return the model's name and its number; one that this run has made of it counts.

    The version is whole: averaged weights, the sampler's code, pinned requirements, a typed signature, a card.
    """
    from mlflow.entities import LoggedModelOutput

    client, state, scores, dataset = run.client, made.state, made.scores, made.dataset
    name = model_name(client, store, dataset, state.recipe.data.image_size)
    tags = _tags(made)
    version = _version_of(client, run, state)
    if version is not None:
        said = {name: tags[name] for name in ("result", "evaluation.protocol")} | scores_tags(scores)
        _follow(client, version, said)
        _tell_start(client, version.name, state, str(version.version))
        return version.name, str(version.version)
    _ensure_registered(client, name, dataset)
    commits = (*filter(None, run.earlier_commits.split(",")), tags["git.commit"])
    own = find_own(store, dataset.digest)
    card = Card(name, state, scores, dataset, commits, run.run_id, made.compute, own)
    model_id, digest = _save(run, store, made, tags, card)
    client.log_outputs(run.run_id, [LoggedModelOutput(model_id, step=state.step)])
    run.log_metrics([(key, value, scores.step) for key, value in metrics(scores).items()], model_id)
    # The tags come with the version, not after it: a version without them could not be judged.
    version = client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run.run_id,
        model_id=model_id,
        tags={**with_lineage({**tags, FILES_TAG: digest}), **scores_tags(scores)},
        description=fit_description(card.text(ASSETS)),
        await_creation_for=0,
    )
    _tell_start(client, name, state, str(version.version))
    return name, str(version.version)


def _version_of(client: MlflowClient, run: TrackedRun, state: CheckpointState) -> ModelVersion | None:
    """The version that this run has made of a checkpoint, under whichever name, and not what people have made of it since."""
    found = [
        version
        for version in client.search_model_versions(f"run_id = '{run.run_id}'")
        if version.source.startswith(LOGGED_MODEL) and tags_of(version).get("checkpoint.digest") == state.digest
    ]
    return min(found, key=lambda version: version.creation_timestamp, default=None)


def _tags(made: Candidate) -> dict[str, str]:
    """What a version says of itself, its figures and the digest of its files aside."""
    state = made.state
    tags = {
        **made.tags,
        "result": headline(made.scores),
        "run": state.run,
        "dataset.name": made.dataset.source,
        "dataset.digest": made.dataset.digest,
        "image_size": str(state.recipe.data.image_size),
        "evaluation.protocol": protocol(state.recipe),
        "recipe.digest": state.recipe.digest,
        "checkpoint.digest": state.digest,
        "checkpoint.step": str(state.step),
    }
    if state.recipe.start is not None:
        tags["start.run"], tags["start.step"] = state.recipe.start.run, str(state.recipe.start.step)
    return tags


def _save(run: TrackedRun, store: Store, made: Candidate, tags: dict[str, str], card: Card) -> tuple[str, str]:
    """Save the model's files in MLflow; returns its id and their digest."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature

    client, state, dataset = run.client, made.state, made.dataset
    logged = client.create_logged_model(
        run.experiment_id, name="sampler", source_run_id=run.run_id, model_type="diffusion", tags=with_lineage(tags)
    )
    status = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as folder:
            contents = _write_files(Path(folder), store, state, made.scores.weights, dataset, made.pictures)
            model_folder = Path(folder, "model")
            mlflow.pyfunc.save_model(
                path=str(model_folder),
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run.run_id,
                    model_id=logged.model_id,
                    model_uuid=logged.model_id,
                ),
                python_model=str(ASSETS / "sampler.py"),
                artifacts=contents,
                code_paths=[str(Path(diffusion.__file__).resolve().parent)],
                input_example=INPUT_EXAMPLE,
                signature=ModelSignature(
                    inputs=None, outputs=_output_schema(state, dataset.images), params=_params(state)
                ),
                pip_requirements=_pinned_requirements(),
            )
            (model_folder / "README.md").write_text(_readme(made, card), encoding="utf-8")
            close_to_others(model_folder)  # what MLflow has copied is as open as its original
            digest = files_digest(model_folder)
            with patient_with_files():
                client.log_model_artifacts(logged.model_id, str(model_folder))
        status = "READY"
    finally:
        client.finalize_logged_model(logged.model_id, status)
    return str(logged.model_id), digest


def _readme(made: Candidate, card: Card) -> str:
    """The card among the model's files, which can show those beside it."""
    lasting = card.text(ASSETS, "The version's description in the registry has it.")
    pictures = "".join(f"![{name}](artifacts/{name}.png)\n\n" for name in made.pictures)
    recipe = f"## Recipe\n\n```json\n{made.state.recipe.model_dump_json(indent=1)}\n```\n"
    return f"{lasting}\n## Pictures\n\n{pictures}{recipe}"


def _follow(client: MlflowClient, version: ModelVersion, tags: dict[str, str]) -> None:
    """Have a version that is there already say what its checkpoint's evaluation says, where that was made again."""
    if version.tags.get(SCORES) != tags[SCORES]:
        for name, value in tags.items():
            client.set_model_version_tag(version.name, version.version, name, value)


def _tell_start(client: MlflowClient, name: str, state: CheckpointState, version: str) -> None:
    """Tag the versions of the checkpoint that this one went on from: lineage leads both ways."""
    if state.recipe.start is not None:
        for before in client.search_model_versions(f"name = '{name}'"):
            if tags_of(before).get("checkpoint.digest") == state.recipe.start.digest:
                client.set_model_version_tag(name, before.version, f"continued_by.{version}", state.run)


def _ensure_registered(client: MlflowClient, name: str, dataset: Manifest) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Diffusion models of {dataset.source} images.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _write_files(
    folder: Path, store: Store, state: CheckpointState, weights: str, dataset: Manifest, pictures: dict[str, bytes]
) -> dict[str, str]:
    """The model's artifacts: the weights that were scored, what is needed to use them, and the pictures."""
    contents = {
        "weights": ("weights.safetensors", checkpoint_file(store, state, f"{weights}.safetensors")),
        "recipe": ("recipe.json", state.recipe.model_dump_json(indent=1).encode()),
        "dataset": ("dataset.json", dataset.to_json()),
        **{name: (f"{name}.png", picture) for name, picture in pictures.items()},
    }
    for name, content in contents.values():
        (folder / name).write_bytes(content)
    return {key: str(folder / name) for key, (name, _) in contents.items()}


def _params(state: CheckpointState):  # type: ignore[no-untyped-def]  # MLflow's classes are imported late
    from mlflow.types import ParamSchema, ParamSpec

    evaluation = state.recipe.evaluation
    return ParamSchema(
        [
            ParamSpec("n", "long", 8),
            ParamSpec("steps", "long", evaluation.sampler_steps),
            ParamSpec("sampler", "string", evaluation.sampler),
            ParamSpec("seed", "long", 0),
            ParamSpec("label", "string", ""),
            ParamSpec("guidance", "double", float(evaluation.guidance)),
            ParamSpec("format", "string", "array"),
        ]
    )


def _output_schema(state: CheckpointState, spec: ImageSpec):  # type: ignore[no-untyped-def]
    import numpy as np
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(np.dtype(spec.dtype), (-1, *spec.shape(state.recipe.data.image_size)))])


def _pinned_requirements() -> list[str]:
    from importlib.metadata import version

    # A local build tag (+cpu, +cu130) names a build that package indexes do not have.
    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]
