"""Checkpoints: the whole state of a training under `checkpoints/<run>/<step>/` in the store.

`state.json` is written last and holds the sha256 of the other files: without a valid one the folder does not exist for
any reader. Tensors are safetensors, all else is JSON.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffusion.data.sealed import seal
from diffusion.errors import CheckpointDamaged
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.training.journal import JOURNAL
from diffusion.training.state import (
    STATE,
    CheckpointState,
    average_name,
    checkpoint_file,
    load_state,
    steps_with_checkpoint,
)

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint."""

    model: Tensors
    """The trained weights."""
    averages: dict[str, Tensors]
    """Their moving averages, by `average_name`."""
    optimizer: Tensors
    """The optimiser's moments and counts, by parameter; what the noise levels remember; the alignment's head, where there is one."""
    journal: bytes
    """The journal up to here."""


def write_checkpoint(store: Store, state: CheckpointState, content: Checkpoint) -> CheckpointState:
    """Write all files, `state.json` last; returns the state with their digests. Raises StoreError."""
    files = {
        "model.safetensors": _saved(content.model),
        **{f"{name}.safetensors": _saved(average) for name, average in content.averages.items()},
        "optimizer.safetensors": _saved(content.optimizer),
        JOURNAL: content.journal,
    }
    where = layout.checkpoint(state.run, state.step)
    for name, data in files.items():
        store.write(f"{where}/{name}", data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    state = state.model_copy(update={"sha256": digests})
    store.write(f"{where}/{STATE}", seal(state))
    return state


def _saved(tensors: Tensors) -> bytes:
    """As they lie in memory on a GPU or a CPU, channels first or last, they are the same bytes here."""
    return save({name: value.contiguous() for name, value in tensors.items()})


def load_latest(
    store: Store, run: str, known: int = 0, until: int | None = None
) -> tuple[CheckpointState, Checkpoint] | None:
    """The newest checkpoint of a run that is whole, or None. A damaged one is named, loudly, and passed over.

    Raises StoreError if the store does not answer: that is no reason to go back.

    Args:
        known: a step that is known to have been written, should the store's listing not show it yet.
        until: no later one is wanted.
    """
    steps = {*steps_with_checkpoint(store, run), *([known] if known else [])}
    for step in sorted((step for step in steps if until is None or step <= until), reverse=True):
        try:
            return load_checkpoint(store, run, step)
        except CheckpointDamaged as error:
            log.error("%s Falling back to the checkpoint before it.", error)
    return None


def load_checkpoint(store: Store, run: str, step: int) -> tuple[CheckpointState, Checkpoint]:
    """Load and verify one checkpoint. Raises CheckpointDamaged that names the file that is missing or damaged."""
    state = load_state(store, run, step)
    averages = {name: load_tensors(store, state, name) for name in map(average_name, state.recipe.ema.half_lives)}
    model, optimizer = (load_tensors(store, state, part) for part in ("model", "optimizer"))
    return state, Checkpoint(model, averages, optimizer, checkpoint_file(store, state, JOURNAL))


def load_tensors(store: Store, state: CheckpointState, part: str) -> Tensors:
    """One of a checkpoint's tensor files (`model`, `optimizer`, `ema-<half-life>`), verified. Raises CheckpointDamaged."""
    name = f"{part}.safetensors"
    try:
        return load(checkpoint_file(store, state, name))
    except SafetensorError as error:
        raise CheckpointDamaged(
            f"{store.uri}/{layout.checkpoint(state.run, state.step)}/{name} has no tensors ({error})."
        ) from error
