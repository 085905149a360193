"""The training loop: from a checkpoint (or from nothing) to a step, on any number of processes."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from diffusion.data.loader import ShardImages, prefetch
from diffusion.data.manifest import require_dataset
from diffusion.errors import CheckpointDamaged, RecipeError, StoreError, StoreRefuses
from diffusion.jobs.rank import Rank
from diffusion.jobs.specs import TrainingJob
from diffusion.model.flops import BACKWARD, forward_flops
from diffusion.recipe import Start
from diffusion.store.objects import Store, open_store
from diffusion.training.batches import Batches
from diffusion.training.checkpoint import Checkpoint, Tensors, load_checkpoint, load_latest, write_checkpoint
from diffusion.training.journal import commit, committed_step
from diffusion.training.recorder import Recorder
from diffusion.training.state import FORMAT_VERSION, CheckpointState, delete_checkpoint, steps_with_checkpoint
from diffusion.training.trainer import Trainer

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
"""Of a run under way: the newest that are no milestone."""


class CheckpointWriter:
    """Writes checkpoints in the background: the loop waits only for the copy to host memory.

    Args:
        folder: the run's, where the newest one that is safely in the store is noted.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._copies = defaultdict[str, HostCopy](HostCopy)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._refused = False

    def save(self, trainer: Trainer, state: CheckpointState, journal: bytes) -> None:
        """Copy the state and start writing it, after the one before has been written."""
        self.wait()
        content = Checkpoint(
            self._copies["model"].take(trainer.network.state_dict()),
            {name: self._copies[name].take(ema.network.state_dict()) for name, ema in trainer.averages.items()},
            self._copies["optimizer"].take(trainer.state_tensors()),
            journal,
        )
        self._pending = self._pool.submit(self._write, state, content)

    def _write(self, state: CheckpointState, content: Checkpoint) -> None:
        written = write_checkpoint(self.store, state, content)
        commit(self.folder, written.step)
        try:
            # Later ones are damaged, or this one would not have been made: they do not count.
            earlier = [step for step in steps_with_checkpoint(self.store, state.run) if step <= state.step]
            passing = [step for step in earlier if step not in state.recipe.milestones]
            for step in passing[:-KEPT_CHECKPOINTS]:
                delete_checkpoint(self.store, state.run, step)
        except StoreError as error:
            log.warning("Older checkpoints were not deleted: %s", error)

    def wait(self) -> None:
        """Wait for the write that is under way. A failure is said, and training goes on: the next save tries again.

        Raises StoreRefuses if the store refused the one before it, too: keys that have expired never write again, and what is
        trained from then on would be lost.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        refused, self._refused = self._refused, False
        try:
            pending.result()
        except (StoreError, OSError) as error:
            if refused and isinstance(error, StoreRefuses):
                raise
            self._refused = isinstance(error, StoreRefuses)
            log.error("The checkpoint was not written: %s", error)

    def finish(self) -> None:
        """Wait for the last write. Raises StoreError if that one failed: there is no later one."""
        if self._pending is not None:
            self._pending.result()
        self._pool.shutdown()


class HostCopy:
    """Tensors in host memory, which is kept for the next time: new memory costs more than the copying."""

    def __init__(self) -> None:
        self._kept = Tensors()

    @torch.no_grad()
    def take(self, tensors: Tensors) -> Tensors:
        """Copy these. What an earlier call gave is written over."""
        self._kept = {name: self._room(name, value) for name, value in tensors.items()}
        if tensors:
            torch._foreach_copy_([*self._kept.values()], [*tensors.values()])
        return self._kept

    def _room(self, name: str, value: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is not None and kept.shape == value.shape and kept.dtype == value.dtype:
            return kept
        return torch.empty_like(value, device="cpu", requires_grad=False)


def state_of(trainer: Trainer, run: str, dataset: str) -> CheckpointState:
    """What the next checkpoint says of itself, its files aside."""
    return CheckpointState(
        format_version=FORMAT_VERSION,
        run=run,
        step=trainer.step,
        images_seen=trainer.images_seen,
        dataset=dataset,
        recipe=trainer.recipe,
        sha256={},
    )


def find_checkpoint(
    store: Store, job: TrainingJob, folder: Path, accelerator: Accelerator
) -> tuple[CheckpointState, Checkpoint] | None:
    """The newest checkpoint, the same on all processes: a store's listing may show them different ones."""
    found, run = None, job.run
    if accelerator.is_main_process:
        found = load_latest(store, run, known=committed_step(folder), until=job.until)
    step = torch.tensor([found[0].step if found else -1], device=accelerator.device)
    chosen = int(broadcast(step).item())
    if chosen < 0 or accelerator.is_main_process:
        return found
    return load_checkpoint(store, run, chosen)


def load_start(store: Store, start: Start) -> Checkpoint:
    """The checkpoint that a recipe starts from. Raises CheckpointDamaged if it is gone, damaged or another one."""
    state, content = load_checkpoint(store, start.run, start.step)
    if state.digest != start.digest:
        raise CheckpointDamaged(
            f"The checkpoint of run {start.run} at step {start.step} in {store.uri} is not the one that the recipe starts from."
        )
    return content


def train_until(job: TrainingJob, rank: Rank) -> None:
    """Train to step `job.until` and leave a checkpoint there.

    A request to end ends it early, with a checkpoint at the step that was reached. Raises RecipeError, DataError or StoreError
    before the first step, TrainingDiverged after it.
    """
    recipe, store, accelerator, folder = job.recipe, open_store(job.store), rank.accelerator, rank.folder
    manifest = require_dataset(store, job.dataset)
    trainer = Trainer(recipe, manifest, accelerator, store)
    flops = (1 + BACKWARD) * forward_flops(trainer.network, len(manifest.images.bands), recipe.data.image_size)
    recorder = Recorder(recipe, accelerator, folder, job.until, flops)

    found = find_checkpoint(store, job, folder, accelerator)
    if found is not None:
        state, content = found
        if (state.recipe, state.dataset) != (recipe, manifest.digest):
            raise RecipeError(
                f"The run {job.run} was begun with another recipe or dataset. Start a new run for this one."
            )
        trainer.restore(state.step, content)
    elif recipe.start is not None:
        trainer.restore(recipe.start.step, load_start(store, recipe.start))
    if accelerator.is_main_process:
        recorder.journal.roll_back(content.journal if found else b"")
        recorder.timing.drop_after(trainer.step)
        commit(folder, found[0].step if found else 0)
    accelerator.wait_for_everyone()

    images = ShardImages(store, manifest, "train", recipe.data.image_size, job.shard_copies)
    batches = Batches(recipe, images, trainer.lanes, pin_memory=accelerator.device.type == "cuda")
    writer = CheckpointWriter(store, folder)
    saved_at, stop_asked = trainer.step, rank.listen()

    def save() -> None:
        nonlocal saved_at
        saved_at = trainer.step
        if accelerator.is_main_process:
            writer.save(trainer, state_of(trainer, job.run, manifest.digest), recorder.journal.read())

    before = time.monotonic()
    for lanes in prefetch(batches, trainer.step, job.until):
        waited = time.monotonic() - before
        report = trainer.train_step([lane.to(accelerator.device) for lane in lanes])
        recorder.record(trainer.step, report, waited)
        # Checkpoints lie where journal records end: the stretch that a record covers is never cut by a resume.
        if trainer.step % recorder.every == 0 and trainer.step < job.until:
            # All processes stop after the same step, or the others would wait for ever.
            if stop_asked():
                accelerator.set_trigger()
            if accelerator.check_trigger():
                break
            if trainer.step - saved_at >= job.checkpoint_every:
                save()
        before = time.monotonic()
    save()
    writer.finish()
    accelerator.wait_for_everyone()
