"""What size costs the loader, on synthetic manifests: its own code, no images.

    python -m benchmarks.scaling [--most 27000000]

Manifests of up to --most samples are made and opened; beyond that, memory and time are taken to grow with the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import time
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from diffusion.data.manifest import FORMAT_VERSION, Manifest, Shard, parse_manifest
from diffusion.data.order import Order
from diffusion.data.spec import RGB, ImageSpec
from diffusion.randomness import stream
from diffusion.recipe_files import load_recipe

SIZES = (27_000, 27_000_000, 27_000_000_000)
PROCESSES = (1, 8, 1000)
SAMPLES_A_SHARD, BYTES_A_SAMPLE = 764, 5_200
"""Of EuroSAT's shards."""
SPEC = ImageSpec(
    bands=RGB,
    size=64,
    dtype="uint8",
    low=(0, 0, 0),
    high=(255, 255, 255),
    mean=(0, 0, 0),
    std=(1, 1, 1),
    shown=(0, 1, 2),
    black=(0, 0, 0),
    white=(255, 255, 255),
    classes=("one", "two"),
)


@dataclass(frozen=True)
class Opened:
    """What a manifest costs."""

    megabytes: float
    seconds: float
    memory: float
    """MB that a process has more of."""
    seek: float
    """Milliseconds, to the batch at any place of any epoch."""


def manifest_of(samples: int) -> bytes:
    """A manifest of about that many samples, nine in ten to train with."""
    shards = [
        Shard(
            name=f"{'test' if number % 10 == 9 else 'train'}-{number:09d}.tar",
            split="test" if number % 10 == 9 else "train",
            samples=SAMPLES_A_SHARD,
            bytes=SAMPLES_A_SHARD * BYTES_A_SAMPLE,
            sha256=hashlib.sha256(str(number).encode()).hexdigest(),
        )
        for number in range(max(10, samples // SAMPLES_A_SHARD))
    ]
    counts = {split: sum(s.samples for s in shards if s.split == split) for split in ("train", "test")}
    return Manifest(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        source="synthetic",
        licence="none",
        images=SPEC,
        splits=counts,  # type: ignore[arg-type]
        shards=tuple(shards),
    ).to_json()


def measure(data: bytes) -> Opened:
    """Open a manifest and seek in it; in a process of its own, whose memory is that of this alone."""
    before, began = _peak(), time.monotonic()
    found = parse_manifest(data, "here")
    seconds = time.monotonic() - began
    order = order_of(len(found.shards_of("train")))
    rng, seeks = stream(0, "benchmark"), []
    for _ in range(30):
        position = int(rng.integers(0, 100 * order.epoch_samples))
        began = time.monotonic()
        order.at(position, 512)
        seeks.append(time.monotonic() - began)
    return Opened(len(data) / 1e6, seconds, _peak() - before, 1000 * float(np.median(seeks)))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def order_of(shards: int) -> Order:
    """The order of a training of the recipe `eurosat` over that many shards."""
    return Order((SAMPLES_A_SHARD,) * shards, load_recipe("eurosat").data.window_shards, 0)


def touched(shards: int, processes: int, windows: int = 8) -> tuple[float, float]:
    """Of the shards and of the samples of some windows, the shares that the first of several processes has a use for."""
    order = order_of(shards)
    positions = min(order.epoch_samples, windows * order.window_shards * SAMPLES_A_SHARD)
    batch = 8 * processes
    used, taken = set(), 0
    for first in range(0, positions, batch):
        chosen, places = order.at(first, min(8, positions - first))
        used |= set(chosen.tolist())
        taken += len(places)
    return len(used) / min(shards, windows * order.window_shards), taken / positions


def same_shard(shards: int, batch: int = 512) -> tuple[float, float]:
    """The chance that two images of a batch are of one shard; and what it would be if all were shuffled together."""
    order, found = order_of(shards), []
    for step in range(20):
        chosen, _ = order.at(step * batch, batch)
        _, counts = np.unique(chosen, return_counts=True)
        found.append((np.square(counts).sum() - batch) / (batch * (batch - 1)))
    return float(np.mean(found)), (SAMPLES_A_SHARD - 1) / (order.epoch_samples - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=SIZES[1])
    arguments = parser.parse_args()
    print("| samples | shards | manifest | opened in | memory | seek | two of a batch of one shard (all shuffled) |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for samples in SIZES:
        made = min(samples, arguments.most)
        with get_context("spawn").Pool(1) as pool:
            opened = pool.apply(measure, (manifest_of(made),))
        times = samples / made
        near, ideal = same_shard(max(9, made * 9 // 10 // SAMPLES_A_SHARD))
        print(
            f"| {samples:,} | {samples // SAMPLES_A_SHARD:,} | {opened.megabytes * times:,.1f} MB | {opened.seconds * times:,.2f} s | "
            f"{opened.memory * times:,.0f} MB | {opened.seek * times:,.1f} ms | {near:.3f} ({ideal / times:.2g}) |"
        )
    print("\n| processes | shards that one has a use for | images | read for each image that it uses |")
    print("| --- | --- | --- | --- |")
    for processes in PROCESSES:
        shards, images = touched(1000, processes)
        print(f"| {processes:,} | {shards:.0%} | {images:.2%} | {shards / images:,.0f} |")


if __name__ == "__main__":
    main()
