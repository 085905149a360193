"""The training loop: from a checkpoint (or from nothing) to a step, on any number of processes."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.data.ingest import find_dataset
from diffusion.data.loader import ShardImages, prefetch
from diffusion.data.store import Store, open_store
from diffusion.denoiser import build_network
from diffusion.errors import DataError, RecipeError, StoreError, TrainingDiverged
from diffusion.job import ProgressFile, TrainingJob
from diffusion.model.ema import EMA
from diffusion.model.placement import place
from diffusion.process.objective import simple_loss
from diffusion.process.prediction import diffuse
from diffusion.process.schedule import noise_variance
from diffusion.recipe import Recipe
from diffusion.training.batches import Batches, Lane
from diffusion.training.checkpoint import Checkpoint, load_latest, write_checkpoint
from diffusion.training.journal import COMMITTED, JOURNAL, TIMING, Journal, drop_after
from diffusion.training.reduction import GradientBuffer, Tree, sum_over_processes
from diffusion.training.state import FORMAT_VERSION, State

log = logging.getLogger(__name__)

JOURNAL_POINTS = 1000  # at most about this many records of metrics in a run
PROGRESS_SECONDS = 5.0


def lanes_of_process(recipe: Recipe, rank: int, processes: int) -> range:
    """The lanes that fall to one process: whole neighbouring subtrees of the tree. Raises RecipeError if they can't."""
    recipe.check_processes(processes)
    share = recipe.data.lanes // processes
    return range(rank * share, (rank + 1) * share)


def learning_rate(recipe: Recipe, images_seen: int) -> float:
    """The rate at a point of the budget: a function of images, not of steps or processes."""
    optimizer, budget = recipe.optimizer, recipe.data.images
    rate = optimizer.learning_rate
    if optimizer.decay == "cosine":
        rate *= 0.5 * (1 + np.cos(np.pi * min(1.0, images_seen / budget)))
    if images_seen < optimizer.warmup_images:
        rate *= images_seen / optimizer.warmup_images
    return float(rate)


def _can_compile(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        log.warning("There is no C compiler, which torch.compile needs: training runs uncompiled, and slower.")
        return False
    return True


class Trainer:
    """Everything that changes while training, and how one step changes it."""

    def __init__(self, recipe: Recipe, classes: int, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.lanes = lanes_of_process(recipe, accelerator.process_index, accelerator.num_processes)
        device = accelerator.device
        self.network = place(build_network(recipe, classes), device)
        self.ema = EMA(self.network, recipe.ema.half_life_images, recipe.ema.ramp)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            fused=True,
        )
        self.step = 0
        fast = recipe.reduction == "fast"
        # DistributedDataParallel is compiled with what it wraps: only so does it send while the backward pass runs.
        self.wrapped: nn.Module = accelerator.prepare_model(self.network) if fast else self.network
        self.forward = torch.compile(self.wrapped) if _can_compile(device) else self.wrapped
        self.gradients = None if fast else GradientBuffer(self.network)

    @property
    def images_seen(self) -> int:
        """Images behind the weights."""
        return self.step * self.recipe.data.batch_size

    def train_step(self, lanes: list[Lane]) -> tuple[list[Tensor], Tensor, float]:
        """One optimiser step. Returns the losses [micro-batch] of each lane, the gradient's norm, the learning rate."""
        recipe = self.recipe
        self.network.train()
        losses = self._exact_gradients(lanes) if self.gradients else self._fast_gradients(lanes)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.optimizer.clip_norm)
        rate = learning_rate(recipe, self.images_seen + recipe.data.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.network, self.images_seen, recipe.data.batch_size)
        return losses, norm, rate

    def _loss(self, lane: Lane) -> Tensor:
        recipe = self.recipe
        x_t = diffuse(lane.x0, lane.epsilon, lane.log_snr).contiguous(memory_format=torch.channels_last)
        if recipe.network.dropout:
            torch.manual_seed(lane.dropout_seed)  # dropout takes its numbers from the global generator only
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = self.forward(x_t, noise_variance(lane.log_snr), lane.label)
        objective = recipe.objective
        return simple_loss(
            output,
            lane.x0,
            lane.epsilon,
            lane.log_snr,
            recipe.process.prediction,
            objective.weighting,
            objective.gamma,
            objective.error,
        )

    def _exact_gradients(self, lanes: list[Lane]) -> list[Tensor]:
        assert self.gradients is not None
        flat, tree, losses = self.gradients.flat, Tree(), []
        for lane in lanes:
            flat.zero_()
            loss = self._loss(lane)
            loss.mean().backward()
            tree.add(flat.clone() if len(lanes) > 1 else flat)
            losses.append(loss.detach())
        total = sum_over_processes(tree.sum())
        # The number of lanes is a power of two: this division is exact as well.
        flat.copy_(total / self.recipe.data.lanes)
        return losses

    def _fast_gradients(self, lanes: list[Lane]) -> list[Tensor]:
        self.optimizer.zero_grad()
        losses = []
        for index, lane in enumerate(lanes):
            last = index == len(lanes) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(lane)
                (loss.mean() / len(lanes)).backward()
            losses.append(loss.detach())
        return losses

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(self, step: int, content: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.step = step
        self.network.load_state_dict(content.model)
        self.ema.network.load_state_dict(content.ema)
        for name, parameter in self.network.named_parameters():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = content.optimizer[f"{name}/{key}"].to(parameter.device)
                # The fused optimiser walks a parameter and its moments together: they share one memory layout.
                state[key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter] = state


class CheckpointWriter:
    """Writes checkpoints in the background: the loop waits only for the copy to host memory."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, trainer: Trainer, state: State, journal: bytes) -> None:
        """Copy the state and start writing it, after the one before has been written."""
        self.wait()
        content = Checkpoint(
            _host_copy(trainer.network.state_dict()),
            _host_copy(trainer.ema.network.state_dict()),
            _host_copy(trainer.optimizer_tensors()),
            journal,
        )
        self._pending = self._pool.submit(self._write, state, content)

    def _write(self, state: State, content: Checkpoint) -> None:
        written = write_checkpoint(self.store, state, content)
        part = self.folder / f"{COMMITTED}.part"
        part.write_text(json.dumps({"step": written.step, "digest": written.digest}))
        part.replace(self.folder / COMMITTED)

    def wait(self) -> None:
        """Wait for the write that is under way. A failure is said, and training goes on: the next save tries again."""
        if self._pending is not None:
            try:
                self._pending.result()
            except StoreError as error:
                log.error("The checkpoint was not written: %s", error)
            self._pending = None

    def finish(self) -> None:
        """Wait for the last write. Raises StoreError if that one failed: there is no later one."""
        if self._pending is not None:
            self._pending.result()
        self._pool.shutdown()


def _host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


class Recorder:
    """Collects what the steps report and writes a journal record for every stretch of them."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path, until: int) -> None:
        self.accelerator, self.recipe, self.folder, self.until = accelerator, recipe, folder, until
        self.every = max(1, recipe.total_steps // JOURNAL_POINTS)
        self.main = accelerator.is_main_process
        self.journal, self.timing = Journal(folder / JOURNAL), Journal(folder / TIMING)
        self._lanes: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._since, self._waited, self._steps = time.monotonic(), 0.0, 0
        self._progress, self._printed = ProgressFile(folder, self.main), 0.0

    def record(
        self, step: int, lanes: list[Lane], losses: list[Tensor], norm: Tensor, rate: float, waited: float
    ) -> None:
        """Take in one step, and write a record if the stretch ends with it. Raises TrainingDiverged."""
        self._lanes.append(torch.stack([_by_noise(lane, loss) for lane, loss in zip(lanes, losses, strict=True)]))
        self._norms.append(norm.detach().double())
        self._waited, self._steps = self._waited + waited, self._steps + 1
        if step % self.every == 0 or step == self.until:
            self._write(step, rate)

    def _write(self, step: int, rate: float) -> None:
        # Processes are ordered as their lanes are, so the rows arrive in lane order whatever their number.
        rows = self.accelerator.gather(torch.stack(self._lanes, dim=1)).cpu().numpy()
        norms = torch.stack(self._norms).cpu().numpy()
        bins = rows.shape[-1] // 2
        sums, counts = rows[..., :bins].sum(axis=(0, 1)), rows[..., bins:].sum(axis=(0, 1))
        steps = range(step - len(norms) + 1, step + 1)
        bad = ~np.isfinite(rows[..., :bins].sum(axis=(0, 2))) | ~np.isfinite(norms)
        if bad.any():
            first_bad = steps[int(np.argmax(bad))]
            rate = learning_rate(self.recipe, first_bad * self.recipe.data.batch_size)
            raise TrainingDiverged(
                f"The loss or its gradient became NaN or infinite at step {first_bad}, with learning rate {rate:.3g}. "
                "Lower optimizer.learning_rate, raise optimizer.warmup_images, or lower optimizer.clip_norm."
            )
        record: dict[str, Any] = {
            "step": step,
            "kind": "metrics",
            "loss": float(sums.sum() / counts.sum()),
            "learning_rate": rate,
            "gradient_norm": float(norms.mean()),
            "loss_by_log_snr": [round(float(s / c), 8) if c else None for s, c in zip(sums, counts, strict=True)],
        }
        self._lanes, self._norms = [], []
        if self.main:
            self.journal.append(record)
            self._write_timing(step, record["loss"])

    def _write_timing(self, step: int, loss: float) -> None:
        now = time.monotonic()
        seconds = now - self._since
        speed = self._steps * self.recipe.data.batch_size / seconds
        remaining = (self.until - step) * self.recipe.data.batch_size / speed
        memory = peak_memory_bytes(self.accelerator.device)
        self.timing.append(
            {
                "step": step,
                "images_per_second": round(speed, 2),
                "data_wait_share": round(self._waited / seconds, 4),
                "peak_memory_bytes": memory,
                "seconds_left": round(remaining, 1),
            }
        )
        self._progress.write("training", step, self.until, f"loss {loss:.4f}, {speed:,.0f} images/s")
        if now - self._printed >= PROGRESS_SECONDS or step == self.until:
            self._printed = now
            print(
                f"step {step:,}/{self.recipe.total_steps:,}  images {step * self.recipe.data.batch_size:,}  loss {loss:.4f}  "
                f"{speed:,.0f} images/s  waiting for data {self._waited / seconds:.0%}  "
                f"peak memory {memory / 2**20:,.0f} MiB  {remaining:,.0f} s to step {self.until:,}",
                flush=True,
            )
        self._since, self._waited, self._steps = now, 0.0, 0


def _by_noise(lane: Lane, loss: Tensor) -> Tensor:
    """Sum of the losses and number of images in each bin of log_snr: float64 [2 * bins]."""
    # A product with a 0/1 matrix adds in a fixed order, which scattered adds on a GPU do not.
    return torch.cat([lane.noise_bin @ loss.double(), lane.noise_bin.sum(dim=1)])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def train(job: TrainingJob, folder: Path, accelerator: Accelerator) -> None:
    """Train to step `job.until` and leave a checkpoint there.

    SIGTERM ends it early, with a checkpoint at the step that was reached. Raises RecipeError, DataError or StoreError
    before the first step, TrainingDiverged after it.
    """
    recipe, store = job.recipe, open_store(job.store)
    manifest = find_dataset(store, job.dataset)
    if manifest is None:
        raise DataError(f"The store {store.uri} has no dataset {job.dataset}. Ingest it first.")
    trainer = Trainer(recipe, len(manifest.classes), accelerator)
    recorder = Recorder(recipe, accelerator, folder, job.until)

    found = load_latest(store, job.run)
    if found is not None:
        state, content = found
        if (state.recipe, state.dataset) != (recipe, manifest.digest):
            raise RecipeError(
                f"The run {job.run} was begun with another recipe or dataset. Start a new run for this one."
            )
        trainer.restore(state.step, content)
    if accelerator.is_main_process:
        recorder.journal.roll_back(content.journal if found else b"")
        drop_after(recorder.timing.path, trainer.step)
    accelerator.wait_for_everyone()

    images = ShardImages(store, manifest, "train", recipe.data.image_size, job.shard_copies)
    batches = Batches(recipe, images, trainer.lanes, pin_memory=accelerator.device.type == "cuda")
    writer = CheckpointWriter(store, folder)
    saved_at, stop_asked = trainer.step, False

    def ask_to_stop(*_: object) -> None:
        nonlocal stop_asked
        stop_asked = True

    signal.signal(signal.SIGTERM, ask_to_stop)

    def save() -> None:
        nonlocal saved_at
        saved_at = trainer.step
        if accelerator.is_main_process:
            state = State(
                format_version=FORMAT_VERSION,
                run=job.run,
                step=trainer.step,
                images_seen=trainer.images_seen,
                dataset=manifest.digest,
                recipe=recipe,
                sha256={},
            )
            writer.save(trainer, state, recorder.journal.read())

    before = time.monotonic()
    for lanes in prefetch(batches, trainer.step, job.until):
        waited = time.monotonic() - before
        moved = [lane.to(accelerator.device) for lane in lanes]
        losses, norm, rate = trainer.train_step(moved)
        recorder.record(trainer.step, moved, losses, norm, rate, waited)
        # Checkpoints lie where journal records end: the stretch that a record covers is never cut by a resume.
        if trainer.step % recorder.every == 0 and trainer.step < job.until:
            # All processes stop after the same step, or the others would wait for ever.
            if stop_asked:
                accelerator.set_trigger()
            if accelerator.check_trigger():
                break
            if trainer.step - saved_at >= job.checkpoint_every:
                save()
        before = time.monotonic()
    save()
    writer.finish()
    accelerator.wait_for_everyone()
