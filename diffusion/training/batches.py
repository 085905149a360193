"""Training batches as a pure function of (manifest, recipe, step), cut into lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.order import Order
from diffusion.pixels import Pixels
from diffusion.process.levels import stratified_uniforms
from diffusion.randomness import normals, stream
from diffusion.recipe import Recipe


@dataclass(frozen=True)
class Lane:
    """One micro-batch with everything random about it already drawn."""

    x0: Tensor
    """Clean images in process space, float32 [micro-batch, bands, height, width]."""
    epsilon: Tensor
    """Standard normal noise like x0."""
    uniform: Tensor
    """What each image's noise level is drawn from: a number in (0, 1), float64 [micro-batch]."""
    label: Tensor | None
    """Class indices, int64 [micro-batch], `classes` where the label is withheld; None for an unconditional network."""
    turn: Tensor | None
    """Quarter turns that were made, 0 to 3, [micro-batch]; None where none ever are."""
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


def quarter_turns(rng: np.random.Generator, count: int, share: float) -> NDArray[np.int64]:
    """How many quarters each image of a batch is turned: 0, or for `share` of them 1, 2 or 3, evenly: int64 [count]."""
    turned, quarters = rng.random(count) < share, rng.integers(1, 4, count)
    return np.where(turned, quarters, 0)


class Batches:
    """The lanes of this process at any step; the window after the one that is in use is read ahead.

    Args:
        lanes: indices of the lanes that fall to this process.
    """

    def __init__(self, recipe: Recipe, images: ShardImages, lanes: range, pin_memory: bool = False) -> None:
        self.recipe, self.images, self.lanes, self.pin_memory = recipe, images, lanes, pin_memory
        sizes = tuple(shard.samples for shard in images.shards)
        self.order = Order(sizes, recipe.data.window_shards, recipe.seed)
        self._prepared_at = 0  # where the window ends whose successor is being read
        self.pixels = Pixels(images.spec)

    def __call__(self, step: int) -> list[Lane]:
        """The lanes of one step, in order."""
        recipe, batch_size = self.recipe, self.recipe.data.batch_size
        micro = batch_size // recipe.data.lanes
        first = step * batch_size
        if first >= self._prepared_at:
            self._prepared_at, in_use = self.order.window(first)
            self.images.prepare(self.order.window(self._prepared_at)[1], in_use)
        # The draws of the whole batch are cheap: each process makes all of them and takes its part.
        uniforms = torch.from_numpy(stratified_uniforms(stream(recipe.seed, "noise level", step), batch_size))
        mirrored = stream(recipe.seed, "mirror", step).random(batch_size) < 0.5
        turns = quarter_turns(stream(recipe.seed, "turn", step), batch_size, recipe.data.quarter_turns)
        withheld = stream(recipe.seed, "label dropout", step).random(batch_size) < recipe.network.label_dropout

        shape = (len(self.images.spec.bands), recipe.data.image_size, recipe.data.image_size)
        lanes = []
        for lane in self.lanes:
            part = slice(lane * micro, (lane + 1) * micro)
            images, labels = self.images.take(*self.order.at(first + part.start, micro))
            if recipe.data.horizontal_flip:
                images[mirrored[part]] = images[mirrored[part], :, ::-1]
            for quarters in (1, 2, 3):
                turned = turns[part] == quarters
                images[turned] = np.rot90(images[turned], quarters, axes=(1, 2))
            noise = normals(recipe.seed, "noise", range(first + part.start, first + part.stop), 0, shape)
            label = None
            if recipe.network.class_conditional:
                classes = len(self.images.spec.classes)
                label = torch.from_numpy(np.where(withheld[part], classes, labels))
            made = Lane(
                x0=self.pixels.encode(images),
                epsilon=torch.from_numpy(noise),
                uniform=uniforms[part],
                label=label,
                turn=torch.from_numpy(turns[part]) if recipe.data.quarter_turns else None,
                dropout_seed=int(stream(recipe.seed, "dropout", step, lane).integers(2**63)),
            )
            lanes.append(made.pin() if self.pin_memory else made)
        return lanes
