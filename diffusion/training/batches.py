"""Training batches as a pure function of (manifest, recipe, step), cut into lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.loader import ShardImages
from diffusion.data.order import Order
from diffusion.denoiser import Pixels, make_schedule
from diffusion.process.levels import log_normal, stratified_uniforms, uniform_in_time
from diffusion.process.schedule import Schedule
from diffusion.randomness import stream
from diffusion.recipe import Recipe
from diffusion.training.journal import LOG_SNR_BIN_EDGES


@dataclass(frozen=True)
class Lane:
    """One micro-batch with everything random about it already drawn."""

    x0: Tensor
    """Clean images in process space, float32 [micro-batch, 3, height, width]."""
    epsilon: Tensor
    """Standard normal noise like x0."""
    log_snr: Tensor
    """Noise level of each image, float64 [micro-batch]."""
    label: Tensor | None
    """Class indices, `classes` where the label is withheld; None for an unconditional network."""
    noise_bin: Tensor
    """1 where an image's log_snr lies in a bin of the journal's, else 0: float64 [bins, micro-batch]."""
    dropout_seed: int
    """Seed of what the network drops."""

    def _map(self, change: Callable[[Tensor], Tensor]) -> Lane:
        tensors: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def to(self, device: torch.device) -> Lane:
        """The same lane on another device; from pinned memory without waiting."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Lane:
        """The same lane in pinned memory."""
        return self._map(lambda tensor: tensor.pin_memory())


def learnable_levels(recipe: Recipe, schedule: Schedule, uniforms: np.ndarray) -> Tensor:
    """The noise levels of a batch, from stratified uniforms: log_snr [batch], float64."""
    if recipe.objective.noise_levels == "uniform":
        return uniform_in_time(uniforms, schedule)
    ends = schedule.log_snr(torch.tensor([1.0, 1e-12], dtype=torch.float64)).tolist()
    return log_normal(uniforms, recipe.objective.log_snr_mean, recipe.objective.log_snr_std, *ends)


class Batches:
    """The lanes of this process at any step.

    Args:
        lanes: indices of the lanes that fall to this process.
    """

    def __init__(self, recipe: Recipe, images: ShardImages, lanes: range, pin_memory: bool = False) -> None:
        self.recipe, self.images, self.lanes, self.pin_memory = recipe, images, lanes, pin_memory
        sizes = tuple(shard.samples for shard in images.shards)
        self.order = Order(sizes, recipe.data.window_shards, recipe.seed)
        self.pixels = Pixels(images.manifest.pixel_mean, images.manifest.pixel_std)
        self.schedule = make_schedule(recipe.process)

    def __call__(self, step: int) -> list[Lane]:
        """The lanes of one step, in order."""
        recipe, batch_size = self.recipe, self.recipe.data.batch_size
        micro = batch_size // recipe.data.lanes
        first = step * batch_size
        # The draws of the whole batch are cheap: each process makes all of them and takes its part.
        levels = learnable_levels(
            recipe, self.schedule, stratified_uniforms(stream(recipe.seed, "noise level", step), batch_size)
        )
        mirrored = stream(recipe.seed, "mirror", step).random(batch_size) < 0.5
        withheld = stream(recipe.seed, "label dropout", step).random(batch_size) < recipe.network.label_dropout

        lanes = []
        for lane in self.lanes:
            part = slice(lane * micro, (lane + 1) * micro)
            images, labels = self.images.take(*self.order.at(first + part.start, micro))
            if recipe.data.horizontal_flip:
                images[mirrored[part]] = images[mirrored[part], :, ::-1]
            noise = [
                stream(recipe.seed, "noise", first + index).standard_normal(
                    (3, recipe.data.image_size, recipe.data.image_size), dtype=np.float32
                )
                for index in range(part.start, part.stop)
            ]
            label = None
            if recipe.network.class_conditional:
                classes = len(self.images.manifest.classes)
                label = torch.from_numpy(np.where(withheld[part], classes, labels))
            made = Lane(
                x0=self.pixels.encode(images),
                epsilon=torch.from_numpy(np.stack(noise)),
                log_snr=levels[part],
                label=label,
                noise_bin=noise_bins(levels[part]),
                dropout_seed=int(stream(recipe.seed, "dropout", step, lane).integers(2**63)),
            )
            lanes.append(made.pin() if self.pin_memory else made)
        return lanes


def noise_bins(log_snr: Tensor) -> Tensor:
    """Which of the journal's bins each noise level lies in: float64 [bins, images], one 1 a column."""
    inner_edges = torch.tensor(LOG_SNR_BIN_EDGES[1:-1], dtype=torch.float64)
    return F.one_hot(torch.bucketize(log_snr, inner_edges, right=True), len(LOG_SNR_BIN_EDGES) - 1).double().T
