"""The order of the samples: a pure function of (shard sizes, seed, position). No I/O, no state.

An epoch visits the shards in a random order, takes `window_shards` whole shards at a time, and shuffles the samples of
such a window among themselves. So a reader holds one window at a time, whatever the size of the data set, and the
sample at any position is found without walking there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffusion.randomness import stream


@dataclass(frozen=True)
class Order:
    """The endless order of one training.

    Args:
        sizes: samples in each shard.
        window_shards: shards that are shuffled together.
        seed: the recipe's.
    """

    sizes: tuple[int, ...]
    window_shards: int
    seed: int

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch: each exactly once."""
        return sum(self.sizes)

    def at(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and place within it of the `count` samples at the positions start, start + 1, … of the endless order."""
        shards, places = [], []
        while count > 0:
            epoch, within_epoch = divmod(start, self.epoch_samples)
            bounds = _window_bounds(self, epoch)
            window = int(np.searchsorted(bounds, within_epoch, side="right")) - 1
            shard_of, place_of = _window(self, epoch, window)
            first = within_epoch - int(bounds[window])
            taken = slice(first, min(first + count, len(shard_of)))
            shards.append(shard_of[taken])
            places.append(place_of[taken])
            start, count = start + len(shards[-1]), count - len(shards[-1])
        return np.concatenate(shards), np.concatenate(places)

    def window(self, position: int) -> tuple[int, list[int]]:
        """The window that a position lies in: the position that it ends before, and its shards."""
        epoch, within_epoch = divmod(position, self.epoch_samples)
        bounds = _window_bounds(self, epoch)
        window = int(np.searchsorted(bounds, within_epoch, side="right")) - 1
        chosen = _shard_order(self, epoch)[window * self.window_shards : (window + 1) * self.window_shards]
        return epoch * self.epoch_samples + int(bounds[window + 1]), chosen.tolist()


@lru_cache(maxsize=8)
def _shard_order(order: Order, epoch: int) -> NDArray[np.int64]:
    return stream(order.seed, "shard order", epoch).permutation(len(order.sizes))


@lru_cache(maxsize=8)
def _window_bounds(order: Order, epoch: int) -> NDArray[np.int64]:
    """Position within the epoch at which each window begins, and the epoch's end."""
    sizes = np.array(order.sizes)[_shard_order(order, epoch)]
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return np.append(ends[: -1 : order.window_shards], ends[-1])


@lru_cache(maxsize=4)
def _window(order: Order, epoch: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard and place of every sample of a window, shuffled."""
    chosen = _shard_order(order, epoch)[window * order.window_shards : (window + 1) * order.window_shards]
    shards = np.concatenate([np.full(order.sizes[shard], shard) for shard in chosen])
    places = np.concatenate([np.arange(order.sizes[shard]) for shard in chosen])
    shuffled = stream(order.seed, "window order", epoch, window).permutation(len(shards))
    return shards[shuffled], places[shuffled]
