"""Checkpoints: the whole state of a training under `checkpoints/<run>/<step>/` in the store.

`state.json` is written last and holds the sha256 of the other files: without a valid one the folder does not exist for
any reader. Tensors are safetensors, all else is JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch import Tensor

from diffusion.data.store import Store
from diffusion.errors import StoreError
from diffusion.recipe import Recipe

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
STATE = "state.json"
TENSOR_FILES = ("model", "ema", "optimizer")


class State(BaseModel):
    """What `state.json` says. All randomness is keyed by (recipe.seed, position): the step is the random state."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    run: str
    step: int
    images_seen: int
    dataset: str
    """Digest of the dataset."""
    recipe: Recipe
    sha256: dict[str, str]
    """Of every other file of the folder."""

    @property
    def digest(self) -> str:
        """The checkpoint's digest: of the weights that it holds, the averaged ones and the rest."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    state: State
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    journal: bytes


def folder(run: str, step: int) -> str:
    """Where a checkpoint lies in the store. The step is padded so that names sort by it."""
    return f"checkpoints/{run}/{step:09d}"


def write_checkpoint(
    store: Store, state: State, model: dict[str, Tensor], ema: dict[str, Tensor], optimizer: dict[str, Tensor], journal: bytes
) -> State:
    """Write all files, `state.json` last; returns the state with their digests. Raises StoreError."""
    where = folder(state.run, state.step)
    contents = {
        "model.safetensors": save(model),
        "ema.safetensors": save(ema),
        "optimizer.safetensors": save(optimizer),
        "journal.jsonl": journal,
    }
    for name, content in contents.items():
        store.write(f"{where}/{name}", content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    state = state.model_copy(update={"sha256": digests})
    store.write(f"{where}/{STATE}", state.model_dump_json(indent=1).encode())
    return state


def latest_step(store: Store, run: str, at_most: int | None = None) -> int | None:
    """The newest step of a run that has a checkpoint, without checking it."""
    steps = _steps(store, run)
    return max((step for step in steps if at_most is None or step <= at_most), default=None)


def load_latest(store: Store, run: str) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole, or None. A damaged one is named, loudly, and passed over."""
    for step in sorted(_steps(store, run), reverse=True):
        try:
            return load_checkpoint(store, run, step)
        except StoreError as error:
            log.error("%s Falling back to the checkpoint before it.", error)
    return None


def load_checkpoint(store: Store, run: str, step: int) -> Checkpoint:
    """Load and verify one checkpoint. Raises StoreError that names the file that is missing or damaged."""
    state = load_state(store, run, step)
    contents = {name: _read(store, state, name) for name in state.sha256}
    return Checkpoint(
        state,
        *(load(contents[f"{name}.safetensors"]) for name in TENSOR_FILES),
        journal=contents["journal.jsonl"],
    )


def load_ema(store: Store, state: State) -> dict[str, Tensor]:
    """Only the averaged weights of a checkpoint, verified."""
    return load(_read(store, state, "ema.safetensors"))


def load_raw(store: Store, state: State) -> dict[str, Tensor]:
    """Only the trained weights of a checkpoint, verified."""
    return load(_read(store, state, "model.safetensors"))


def load_state(store: Store, run: str, step: int) -> State:
    """The state of one checkpoint. Raises StoreError if there is none, or it is damaged."""
    where = f"{folder(run, step)}/{STATE}"
    try:
        state = State.model_validate_json(store.read(where))
    except KeyError:
        raise StoreError(f"There is no checkpoint of run {run} at step {step} in {store.uri}.") from None
    except ValidationError as error:
        raise StoreError(f"The checkpoint {store.uri}/{where} is damaged: {error}.") from error
    if (state.format_version, state.run, state.step) != (FORMAT_VERSION, run, step):
        raise StoreError(f"The checkpoint {store.uri}/{where} is another one: {state.run} at step {state.step}.")
    return state


def _read(store: Store, state: State, name: str) -> bytes:
    where = f"{folder(state.run, state.step)}/{name}"
    try:
        content = store.read(where)
    except KeyError:
        raise StoreError(f"The checkpoint file {store.uri}/{where} is missing.") from None
    if hashlib.sha256(content).hexdigest() != state.sha256.get(name):
        raise StoreError(f"The checkpoint file {store.uri}/{where} is damaged: its sha256 is not that of {STATE}.")
    return content


def _steps(store: Store, run: str) -> list[int]:
    names = store.names(f"checkpoints/{run}/")
    return [int(name.split("/")[-2]) for name in names if name.endswith(f"/{STATE}")]
