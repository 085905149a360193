"""Checkpoints and journals: whole or not there, and damage is named."""

import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion.data.loader import ShardImages
from diffusion.errors import StoreError
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.training.batches import Batches
from diffusion.training.checkpoint import (
    Checkpoint,
    Tensors,
    load_checkpoint,
    load_latest,
    load_tensors,
    write_checkpoint,
)
from diffusion.training.journal import Journal, records
from diffusion.training.loop import CheckpointWriter, state_of
from diffusion.training.state import FORMAT_VERSION, CheckpointState, average_name, load_state, steps_with_checkpoint
from diffusion.training.trainer import Trainer
from tests.conftest import PATIENCE, Ingested, tiny_recipe


def content(step: int) -> Checkpoint:
    tensors = {"weight": torch.full((3, 2), float(step)), "bias": torch.arange(2)}
    averages = {name: {"weight": torch.zeros(3)} for name in map(average_name, tiny_recipe().ema.half_lives)}
    return Checkpoint(tensors, averages, {"weight/exp_avg": torch.ones(2)}, b'{"step": 1}\n')


def write(store: FolderStore, step: int, run: str = "run") -> CheckpointState:
    state = CheckpointState(
        format_version=FORMAT_VERSION,
        run=run,
        step=step,
        images_seen=step * 16,
        dataset="d" * 64,
        recipe=tiny_recipe(),
        sha256={},
    )
    return write_checkpoint(store, state, content(step))


def test_a_checkpoint_gives_back_what_was_written(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    written = write(store, 10)
    state, read = load_checkpoint(store, "run", 10)
    assert state == written
    assert torch.equal(read.model["weight"], content(10).model["weight"])
    assert read.model["bias"].dtype == torch.int64
    assert read.journal == content(10).journal
    assert set(state.sha256) == {
        "model.safetensors",
        "ema-500000.safetensors",
        "optimizer.safetensors",
        "journal.jsonl",
    }


def test_the_newest_checkpoint_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for step in (9, 10, 100, 1_000_000_000):
        write(store, step)
    write(store, 5, run="run-2")
    assert steps_with_checkpoint(store, "run") == [9, 10, 100, 1_000_000_000]
    found = load_latest(store, "run")
    assert found is not None
    assert found[0].step == 1_000_000_000
    assert load_latest(store, "nobody") is None


def test_without_its_state_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    write(store, 1)
    write(store, 2)
    store.delete(f"{layout.checkpoint('run', 2)}/state.json")
    assert steps_with_checkpoint(store, "run") == [1]
    with pytest.raises(StoreError, match="no checkpoint"):
        load_state(store, "run", 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    file=st.sampled_from(["model.safetensors", "ema-500000.safetensors", "optimizer.safetensors", "journal.jsonl"]),
    position=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    cut=st.booleans(),
)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, position: int, bit: int, cut: bool
) -> None:
    store = FolderStore(tmp_path)
    write(store, 1)
    write(store, 2)
    name = f"{layout.checkpoint('run', 2)}/{file}"
    data = bytearray(store.read(name))
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] ^= 1 << bit
    store.write(name, bytes(data))
    with pytest.raises(StoreError, match=file):
        load_checkpoint(store, "run", 2)
    caplog.clear()
    found = load_latest(store, "run")
    assert found is not None
    assert found[0].step == 1
    assert file in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_in_the_state_is_never_resumed_from_unnoticed(tmp_path: Path, position: int, value: int) -> None:
    store = FolderStore(tmp_path)
    written = write(store, 1)
    name = f"{layout.checkpoint('run', 1)}/state.json"
    data = bytearray(store.read(name))
    if data[position % len(data)] == value:
        return
    data[position % len(data)] = value
    store.write(name, bytes(data))
    try:
        state, _ = load_checkpoint(store, "run", 1)
    except StoreError:
        return
    assert state == written


def test_a_journal_is_rolled_back_and_a_cut_line_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in (1, 2, 3):
        journal.append({"step": step, "loss": step / 3})
    kept = journal.read()
    journal.append({"step": 4})
    journal.roll_back(kept)
    assert journal.read() == kept
    with journal.path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    again = Journal(journal.path)
    assert [record["step"] for record in records(again.read())] == [1, 2, 3]
    again.drop_after(2)
    assert [record["step"] for record in records(journal.path.read_bytes())] == [1, 2]
    again.append({"step": 3})
    assert [record["step"] for record in records(journal.path.read_bytes())] == [1, 2, 3]
    assert records(b"") == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_journal_is_healed_by_the_checkpoint_that_a_training_goes_on_from(
    tmp_path: Path, position: int, bit: int, cut: bool
) -> None:
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for step in (1, 2, 3):
        journal.append({"step": step, "loss": step / 3})
    kept = journal.read()
    journal.append({"step": 4, "loss": 1.0})
    data = bytearray(journal.read())
    position %= len(data)
    if cut:
        del data[position:]
        assert [record["step"] for record in records(bytes(data))] == list(range(1, data.count(b"\n") + 1))
    else:
        data[position] ^= 1 << bit
    path.write_bytes(bytes(data))
    # What a training does with it that goes on: a damaged line is never taken for the rest of the journal.
    resumed = Journal(path)
    resumed.roll_back(kept)
    resumed.append({"step": 4, "loss": 2.0})
    assert [record["step"] for record in records(resumed.read())] == [1, 2, 3, 4]
    assert resumed.read().startswith(kept)


class HeldStore(FolderStore):
    """Writes nothing before it may."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may = threading.Event()

    def write(self, name: str, data: bytes) -> None:
        assert self.may.wait(PATIENCE)
        super().write(name, data)


def test_a_checkpoint_is_of_its_step_though_training_goes_on_while_it_is_written(
    ingested: Ingested, tmp_path: Path
) -> None:
    """Each is copied into the memory of the one before it."""
    store, recipe = HeldStore(tmp_path), tiny_recipe()
    trainer = Trainer(recipe, ingested.manifest, Accelerator(cpu=True), store)
    images = ShardImages(ingested.store, ingested.manifest, "train", 16, tmp_path / "copies")
    writer, batches = CheckpointWriter(store, tmp_path), Batches(recipe, images, trainer.lanes)
    copied: list[dict[str, Tensors]] = []
    for step in (0, 2):  # before the first step the optimiser has no state
        parts = {"model": trainer.network.state_dict(), "optimizer": trainer.state_tensors()}
        copied.append({part: {name: value.clone() for name, value in of.items()} for part, of in parts.items()})
        store.may.clear()
        writer.save(trainer, state_of(trainer, "run", ingested.manifest.digest), b"")
        for after in (step, step + 1):
            trainer.train_step(batches(after))
        store.may.set()
        writer.wait()
    writer.finish()
    for step, of_step in zip((0, 2), copied, strict=True):
        for part, tensors in of_step.items():
            read = load_tensors(store, load_state(store, "run", step), part)
            assert read.keys() == tensors.keys()
            assert all(torch.equal(read[name], value) for name, value in tensors.items()), (step, part)
