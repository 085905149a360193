"""The loader: the images of any stretch of the order, decoded once and kept while they fit in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from diffusion.data.manifest import Manifest, Shard, Split
from diffusion.data.shards import Sample, decode_all, read_shard
from diffusion.data.spec import Images, Labels
from diffusion.errors import DataError
from diffusion.store import layout
from diffusion.store.copies import LocalCopy, StoreDamage
from diffusion.store.objects import Store

MEMORY_BYTES = 1 << 30

T = TypeVar("T")


class ShardImages:
    """Decoded shards of one split; beyond `memory_bytes` those read longest ago are dropped. For one thread at a time.

    Args:
        image_size: size to which the images are averaged down.
        folder: where copies of a remote store's shards are kept.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        split: Split,
        image_size: int,
        folder: Path,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.manifest, self.image_size, self.memory_bytes = manifest, image_size, memory_bytes
        self.spec = manifest.images
        self.shards: tuple[Shard, ...] = manifest.shards_of(split)
        self._files = LocalCopy(store, folder)
        self._decoded: OrderedDict[int, tuple[Images, Labels]] = OrderedDict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next-window")
        self._pending: dict[int, Future[tuple[Images, Labels]]] = {}
        self._needed: frozenset[int] = frozenset()

    def shard(self, index: int) -> tuple[Images, Labels]:
        """All images and labels of one shard. Raises DataError or StoreError if its bytes are not the manifest's."""
        if index not in self._decoded:
            pending = self._pending.pop(index, None)
            self._decoded[index] = pending.result() if pending else self._decode(index)
            self._drop({index, *self._needed})
        self._decoded.move_to_end(index)
        return self._decoded[index]

    def _drop(self, needed: set[int]) -> None:
        for index in [index for index in self._decoded if index not in needed]:
            if sum(images.nbytes for images, _ in self._decoded.values()) <= self.memory_bytes:
                return
            del self._decoded[index]

    def prepare(self, indices: list[int], in_use: Iterable[int]) -> None:
        """Begin to read and decode shards that will be asked for, in the background and in this order.

        Neither these nor those `in_use` are dropped until the next call, whatever their size: each would be decoded anew for
        every batch.
        """
        self._needed = frozenset([*in_use, *indices])
        for index in indices:
            if index not in self._decoded and index not in self._pending:
                self._pending[index] = self._pool.submit(self._decode, index)

    def _decode(self, index: int) -> tuple[Images, Labels]:
        samples = self._samples(index)
        return decode_all(samples, self.spec, self.image_size), _labels(samples)

    def labels(self) -> Labels:
        """The labels of all images in the manifest's order, none of which is decoded."""
        return np.concatenate([_labels(self._samples(index)) for index in range(len(self.shards))])

    def _samples(self, index: int) -> list[Sample]:
        shard = self.shards[index]
        name = f"{layout.dataset(self.manifest.digest)}/{shard.name}"
        try:
            return read_shard(self._files.read(name, shard.sha256), name)
        except KeyError:
            reason = "is missing"
        except StoreDamage as error:
            reason = str(error)
        raise DataError(
            f"The shard {self._files.store.uri}/{name} {reason}. Delete {layout.manifest(self.manifest.digest)} from the store and "
            "start again: the shards are made anew."
        )

    def take(self, shards: NDArray[np.int64], places: NDArray[np.int64]) -> tuple[Images, Labels]:
        """The images at these shards and places, in that order."""
        images = np.empty((len(shards), *self.spec.shape(self.image_size)), self.spec.dtype)
        labels = np.empty(len(shards), np.int64)
        for index in np.unique(shards):
            chosen = shards == index
            images[chosen], labels[chosen] = self._some(int(index), places[chosen])
        return images, labels

    def _some(self, index: int, places: NDArray[np.int64]) -> tuple[Images, Labels]:
        if self.memory_bytes or index in self._decoded or index in self._pending:
            images, labels = self.shard(index)
            return images[places], labels[places]
        # Nothing is kept: the others would be decoded for nothing.
        samples = self._samples(index)
        some = [samples[place] for place in places]
        return decode_all(some, self.spec, self.image_size), _labels(some)

    def first(self, count: int) -> tuple[Images, Labels]:
        """The first images and labels, up to so many: no more shards are read."""
        images, labels, missing = list[Images](), list[Labels](), count
        for of_shard, of_labels in self.all():
            images.append(of_shard[:missing])
            labels.append(of_labels[:missing])
            missing -= len(images[-1])
            if not missing:
                break
        return np.concatenate(images), np.concatenate(labels)

    def all(self) -> Iterator[tuple[Images, Labels]]:
        """Every shard's images and labels, in the manifest's order."""
        for index in range(len(self.shards)):
            yield self.shard(index)


def _labels(samples: list[Sample]) -> Labels:
    return np.array([sample.label or 0 for sample in samples])


def prefetch(make: Callable[[int], T], start: int, end: int, ahead: int = 2) -> Iterator[T]:
    """make(start), …, make(end - 1), made up to `ahead` calls early in one background thread.

    `make` must be a pure function of its argument, so that nothing depends on how far it ran ahead.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        pending: list[Future[T]] = [pool.submit(make, index) for index in range(start, min(start + ahead, end))]
        try:
            for index in range(start, end):
                result = pending.pop(0).result()
                if index + ahead < end:
                    pending.append(pool.submit(make, index + ahead))
                yield result
        finally:
            for future in pending:
                future.cancel()
