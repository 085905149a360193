"""The recorder: turns what the steps report into journal records, timing and a line of progress."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from diffusion.errors import TrainingDiverged
from diffusion.jobs.reports import ProgressFile
from diffusion.model.flops import peak_flops
from diffusion.recipe import Recipe
from diffusion.training.journal import JOURNAL, LOG_SNR_BIN_EDGES, TIMING, Journal
from diffusion.training.trainer import StepReport, learning_rate

JOURNAL_POINTS = 1000  # at most about this many records of metrics in a run
PROGRESS_SECONDS = 5.0


class Recorder:
    """Collects what the steps report and writes a journal record for every stretch of them.

    Args:
        flops: what the network computes for an image that it is trained on.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path, until: int, flops: float) -> None:
        self.accelerator, self.recipe, self.folder, self.until = accelerator, recipe, folder, until
        self.stretch_start = recipe.stretch_start(until)
        self.every = max(1, recipe.total_steps // JOURNAL_POINTS)
        self.main = accelerator.is_main_process
        self.journal, self.timing = Journal(folder / JOURNAL), Journal(folder / TIMING)
        self._lanes: list[Tensor] = []
        self._norms: list[Tensor] = []
        # Once: each copy to a GPU waits for what it computes.
        self._edges = torch.tensor(LOG_SNR_BIN_EDGES[1:-1], dtype=torch.float64, device=accelerator.device)
        self._since, self._waited, self._steps = time.monotonic(), 0.0, 0
        # Each process measures, so that all cores are as busy as in training. Many CPUs are slower in bf16 than in float32.
        kinds = {torch.float32, torch.bfloat16 if recipe.precision == "bf16" else torch.float32}
        peak = max(peak_flops(accelerator.device, kind) for kind in kinds)
        self._most = accelerator.num_processes * peak / flops  # images a second
        self._progress, self._printed = ProgressFile(folder, self.main), 0.0

    def record(self, step: int, report: StepReport, waited: float) -> None:
        """Take in one step, and write a record if the stretch ends with it. Raises TrainingDiverged."""
        self._lanes.append(
            torch.stack([_by_noise(*lane, self._edges) for lane in zip(report.log_snr, report.losses, strict=True)])
        )
        self._norms.append(report.gradient_norm.detach().double())
        self._waited, self._steps = self._waited + waited, self._steps + 1
        if step % self.every == 0 or step == self.until:
            self._write(step, report.learning_rate)

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
                "model_flops_utilisation": round(speed / self._most, 4),
                "data_wait_share": round(self._waited / seconds, 4),
                "peak_memory_bytes": memory,
            }
        )
        done, stretch = step - self.stretch_start, self.until - self.stretch_start
        self._progress.write("training", done, stretch, f"loss {loss:.4f}, {speed:,.0f} images/s")
        if now - self._printed >= PROGRESS_SECONDS or step == self.until:
            self._printed = now
            print(
                f"step {step:,}/{self.recipe.total_steps:,}  images {step * self.recipe.data.batch_size:,}  loss {loss:.4f}  "
                f"{speed:,.0f} images/s  waiting for data {self._waited / seconds:.0%}  "
                f"peak memory {memory / 2**20:,.0f} MiB  {remaining:,.0f} s to step {self.until:,}",
                flush=True,
            )
        self._since, self._waited, self._steps = now, 0.0, 0


def _by_noise(log_snr: Tensor, loss: Tensor, inner_edges: Tensor) -> Tensor:
    """Sum of a lane's losses and number of its images in each bin of log_snr: float64 [2 * bins]."""
    member = F.one_hot(torch.bucketize(log_snr, inner_edges, right=True), len(LOG_SNR_BIN_EDGES) - 1).double()
    # A product with a 0/1 matrix adds in a fixed order, which scattered adds on a GPU do not.
    return torch.cat([loss.double() @ member, member.sum(dim=0)])


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
