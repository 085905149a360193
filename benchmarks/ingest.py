"""What size costs: memory and time of an ingestion of many gigabytes, and of a manifest of many samples.

    python -m benchmarks.ingest [--gigabytes 10] [--samples 10000000]

The images are made as they are asked for (13 bands of 128 x 128, 16 bits), so that nothing but the ingestion reads or holds
them; the store is a folder in --folder, deleted afterwards. The ingestion's speed is shown beside that of writing the same
bytes to the same disk.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from diffusion.data import codecs
from diffusion.data.ingest import ingest
from diffusion.data.manifest import Manifest, Shard, Split, find_dataset
from diffusion.data.order import Order
from diffusion.data.sources.source import Source, SourceImage, make_source
from diffusion.randomness import stream
from diffusion.recipe_files import load_recipe
from diffusion.store import layout
from diffusion.store.objects import FolderStore

SIDE, BANDS = 128, 13
SAMPLES_A_SHARD = 1300


def image(number: int) -> bytes:
    """One image as NPY: noise around a level, the same whenever it is asked for."""
    rng = np.random.Generator(np.random.Philox(key=number))
    return codecs.to_npy(rng.integers(500, 4000, (SIDE, SIDE, BANDS), np.uint16))


def source_of(gigabytes: float) -> Source:
    """That many bytes of images, and their digests, of a class in ten."""
    count = int(gigabytes * 1e9 / len(image(0)))

    def one(number: int) -> SourceImage:
        content = image(number)
        digest = hashlib.sha256(content).hexdigest()
        return SourceImage(f"class{number % 10}", f"{number:08d}.npy", digest, len(content), partial(image, number))

    return make_source("generated", "CC0", (one(number) for number in range(count)))


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_speed(folder: Path) -> float:
    """Bytes a second that the disk takes, a shard's worth at a time, each made to last."""
    block, began, written = os.urandom(4_000_000), time.monotonic(), 0
    while written < 200_000_000:
        path = folder / f"probe{written}"
        with path.open("wb") as file:
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        written += len(block)
    return written / (time.monotonic() - began)


def measure_ingestion(gigabytes: float, folder: Path) -> Manifest:
    """Ingest, and say what it took."""
    before, disk = peak_megabytes(), write_speed(folder)
    began = time.monotonic()
    source = source_of(gigabytes)
    listed = time.monotonic() - began
    began = time.monotonic()
    manifest = ingest(source, FolderStore(folder / "store"))
    seconds = time.monotonic() - began
    total = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{sum(manifest.splits.values()):,} images, {total / 1e9:.1f} GB in {len(manifest.shards):,} shards: {seconds:.0f} s "
        f"({total / seconds / 1e6:.0f} MB/s; the disk alone takes {disk / 1e6:.0f}), after {listed:.0f} s for the digests; "
        f"at most {peak_megabytes():.0f} MB of memory, {before:.0f} of it before"
    )
    return manifest


def measure_manifest(manifest: Manifest, samples: int, folder: Path) -> None:
    """Open a manifest of that many samples, and find a place in it."""
    splits: tuple[tuple[Split, float], ...] = (("train", 0.9), ("test", 0.1))
    shards = tuple(
        Shard(
            name=f"{split}-{number:05d}.tar",
            split=split,
            samples=SAMPLES_A_SHARD,
            bytes=4_000_000,
            sha256=hashlib.sha256(f"{split}{number}".encode()).hexdigest(),
        )
        for split, share in splits
        for number in range(int(samples * share / SAMPLES_A_SHARD))
    )
    counts = {split: sum(s.samples for s in shards if s.split == split) for split, _ in splits}
    large, store = manifest.model_copy(update={"shards": shards, "splits": counts}), FolderStore(folder / "manifests")
    store.write(layout.manifest(large.digest), large.to_json())
    before, began = peak_megabytes(), time.monotonic()
    found = find_dataset(store, large.digest)
    assert found is not None
    opened = time.monotonic() - began
    recipe = load_recipe("eurosat")
    order = Order(tuple(s.samples for s in found.shards_of("train")), recipe.data.window_shards, 0)
    rng, seeks = stream(0, "benchmark"), []
    for _ in range(50):
        position = int(rng.integers(0, 100 * order.epoch_samples))
        began = time.monotonic()
        order.at(position, recipe.data.batch_size)
        seeks.append(time.monotonic() - began)
    print(
        f"a manifest of {sum(counts.values()):,} samples in {len(shards):,} shards ({len(large.to_json()) / 1e6:.1f} MB): opened in "
        f"{opened:.2f} s, {peak_megabytes() - before:.0f} MB more; a seek to any place of any epoch "
        f"{1000 * float(np.median(seeks)):.1f} ms, at most {1000 * max(seeks):.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="a disk with room for them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        manifest = measure_ingestion(arguments.gigabytes, Path(folder))
        measure_manifest(manifest, arguments.samples, Path(folder))


if __name__ == "__main__":
    main()
