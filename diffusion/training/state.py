"""What a checkpoint says of itself: `checkpoints/<run>/<step>/state.json`. No torch in here."""

from __future__ import annotations

import hashlib
import json
import logging

from pydantic import BaseModel, ConfigDict

from diffusion.data.sealed import unseal
from diffusion.errors import CheckpointDamaged
from diffusion.recipe import Recipe
from diffusion.store import layout
from diffusion.store.layout import STATE
from diffusion.store.objects import Store
from diffusion.trust.identifiers import ObjectName, RunName, Sha256

log = logging.getLogger(__name__)

FORMAT_VERSION = 1


class CheckpointState(BaseModel):
    """The content of `state.json`. All randomness is keyed by (recipe.seed, position): the step is the random state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    run: RunName
    step: int
    images_seen: int
    dataset: Sha256
    """Digest of the dataset."""
    recipe: Recipe
    sha256: dict[ObjectName, Sha256]
    """Of every other file of the folder."""

    @property
    def digest(self) -> str:
        """The checkpoint's digest: of all its files together."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()


def average_name(half_life: float) -> str:
    """Name of a moving average in a checkpoint, by its half-life in images."""
    return f"ema-{half_life:.0f}"


def weights_to_try(recipe: Recipe, step: int) -> list[str]:
    """Names of the weights that an evaluation chooses from: one on the way, every moving average after training."""
    if recipe.evaluation.weights == "raw":
        return ["model"]
    averages = [average_name(half_life) for half_life in recipe.ema.half_lives]
    return averages if step == recipe.total_steps else averages[:1]


def steps_with_checkpoint(store: Store, run: str) -> list[int]:
    """The steps of a run that have a checkpoint, rising, without checking the files."""
    names = store.names(layout.checkpoints(run))
    return sorted(int(step) for step, file in _steps_and_files(names) if file == STATE)


def steps_begun(store: Store, run: str) -> list[int]:
    """The steps of a run of which any file is there, rising: also checkpoints that were never finished."""
    return sorted({int(step) for step, _ in _steps_and_files(store.names(layout.checkpoints(run)))})


def _steps_and_files(names: list[str]) -> list[tuple[str, str]]:
    """Of names in a run's folder, those that a checkpoint can have."""
    parts = [name.split("/") for name in names]
    return [(part[2], part[3]) for part in parts if len(part) == 4 and part[2].isdecimal()]


def load_state(store: Store, run: str, step: int) -> CheckpointState:
    """The state of one checkpoint. Raises CheckpointDamaged if there is none, or it is damaged."""
    where = f"{layout.checkpoint(run, step)}/{STATE}"
    try:
        content = store.read(where)
    except KeyError:
        raise CheckpointDamaged(f"There is no checkpoint of run {run} at step {step} in {store.uri}.") from None
    try:
        state = unseal(CheckpointState, content)
    except ValueError as error:
        raise CheckpointDamaged(f"The checkpoint {store.uri}/{where} is damaged: {error}.") from error
    if (state.format_version, state.run, state.step) != (FORMAT_VERSION, run, step):
        raise CheckpointDamaged(f"The checkpoint {store.uri}/{where} is another one: {state.run} at step {state.step}.")
    return state


def is_whole(store: Store, run: str, step: int) -> bool:
    """Whether the run has a checkpoint at that step with all its files undamaged; what is wrong with it is logged."""
    try:
        store.read(f"{layout.checkpoint(run, step)}/{STATE}")  # not looked up in a listing, which may lag
    except KeyError:
        return False
    try:
        state = load_state(store, run, step)
        for name in state.sha256:
            checkpoint_file(store, state, name)
    except CheckpointDamaged as error:
        log.error("%s It will be made again.", error)
        return False
    return True


def checkpoint_file(store: Store, state: CheckpointState, name: str) -> bytes:
    """The content of a checkpoint's file, verified. Raises CheckpointDamaged that names the file if it is missing or damaged."""
    where = f"{layout.checkpoint(state.run, state.step)}/{name}"
    try:
        content = store.read(where)
    except KeyError:
        raise CheckpointDamaged(f"The checkpoint file {store.uri}/{where} is missing.") from None
    if hashlib.sha256(content).hexdigest() != state.sha256.get(name):
        raise CheckpointDamaged(
            f"The checkpoint file {store.uri}/{where} is damaged: its sha256 is not the one in {STATE}."
        )
    return content


def checkpoint_names(store: Store, run: str, step: int) -> list[str]:
    """The files of a checkpoint in the order to delete them: its state first, so that what is left of a deletion that breaks
    off is no checkpoint for any reader."""
    where = layout.checkpoint(run, step)
    return sorted(store.names(f"{where}/"), key=lambda name: name != f"{where}/{STATE}")


def delete_checkpoint(store: Store, run: str, step: int) -> None:
    """Delete a checkpoint."""
    store.delete(f"{layout.checkpoint(run, step)}/{STATE}")  # a listing may lag
    for name in checkpoint_names(store, run, step):
        store.delete(name)
