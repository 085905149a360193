"""Turn a source into a dataset version: shards in the store, and last of all the manifest that makes them one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion.data.eurosat import CLASSES, IMAGE_SIZE, Source, SourceImage
from diffusion.data.manifest import FORMAT_VERSION, Manifest, Shard, Split, manifest_path, parse_manifest
from diffusion.data.shards import Sample, bytes_in_shard, decode_all, write_shard
from diffusion.data.store import Store

SHARD_BYTES = 4_000_000
TEST_SHARE = 0.1

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""


def find_dataset(store: Store, digest: str) -> Manifest | None:
    """The dataset of that content digest, or None if the store does not hold it."""
    name = manifest_path(digest)
    try:
        return parse_manifest(store.read(name), f"{store.uri}/{name}")
    except KeyError:
        return None


def ingest(source: Source, store: Store, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> Manifest:
    """Write `source` into `store` as WebDataset shards and return its manifest. Writes nothing if it is there already.

    Every image is decoded once, so that a damaged one is found here and not in training. Raises DataError for an image
    that does not decode, StoreError if the store can't be written; without its manifest a half-written dataset is none.
    """
    found = find_dataset(store, source.digest)
    if found is not None:
        return found
    folder = manifest_path(source.digest).rpartition("/")[0]
    splits = split_by_hash(source)
    total = len(source.images)
    done = 0
    sums, squares = np.zeros(3), np.zeros(3)
    shards: list[Shard] = []
    with ThreadPoolExecutor(max_workers=4) as uploads:  # an upload waits for the network while the next shard is made
        pending = []
        for split, samples in splits.items():
            for number, chunk in enumerate(_chunks(samples, shard_bytes)):
                images = decode_all(chunk, IMAGE_SIZE, IMAGE_SIZE)
                if split == "train":
                    levels = images.astype(np.float64).reshape(-1, 3)
                    sums += levels.sum(axis=0)
                    squares += np.square(levels).sum(axis=0)
                data = write_shard(chunk)
                name = f"{split}-{number:05d}.tar"
                digest = hashlib.sha256(data).hexdigest()
                shards.append(Shard(name=name, split=split, samples=len(chunk), bytes=len(data), sha256=digest))
                pending.append(uploads.submit(store.write, f"{folder}/{name}", data))
                done += len(chunk)
                if progress:
                    progress(done, total)
        for upload in pending:
            upload.result()
    pixels = len(splits["train"]) * IMAGE_SIZE**2
    mean = sums / pixels
    std = np.sqrt(squares / pixels - mean**2)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        digest=source.digest,
        source=source.name,
        licence=source.licence,
        classes=CLASSES,
        image_size=IMAGE_SIZE,
        splits={split: len(samples) for split, samples in splits.items()},
        pixel_mean=_three(mean / 127.5 - 1),
        pixel_std=_three(std / 127.5),
        shards=tuple(shards),
    )
    if not store.create(manifest_path(source.digest), manifest.to_json()):
        store.write(manifest_path(source.digest), manifest.to_json())  # over a damaged one
    return manifest


def split_by_hash(source: Source) -> dict[Split, list[Sample]]:
    """The tenth of each class whose file names have the smallest sha256 is the test split; the rest trains.

    Within a split the samples are in the order of those hashes, which mixes the classes evenly over the shards.
    """
    splits: dict[Split, list[Sample]] = {"train": [], "test": []}
    for label, class_name in enumerate(CLASSES):
        images = sorted((image for image in source.images if image.class_name == class_name), key=_name_hash)
        cut = round(TEST_SHARE * len(images))
        parts: dict[Split, list[SourceImage]] = {"test": images[:cut], "train": images[cut:]}
        for split, chosen in parts.items():
            splits[split] += [Sample(image.file_name.rpartition(".")[0], image.jpeg, label) for image in chosen]
    for samples in splits.values():
        samples.sort(key=lambda sample: hashlib.sha256(f"{sample.key}.jpg".encode()).hexdigest())
    return splits


def _name_hash(image: SourceImage) -> str:
    return hashlib.sha256(image.file_name.encode()).hexdigest()


def _chunks(samples: list[Sample], shard_bytes: int) -> Iterator[list[Sample]]:
    """Cut a split into shards of about that many bytes, as even as can be."""
    if not samples:
        return
    sizes = np.cumsum([bytes_in_shard(sample) for sample in samples])
    count = max(1, round(sizes[-1] / shard_bytes))
    bounds = np.searchsorted(sizes, np.linspace(0, sizes[-1], count + 1)[1:-1])
    start = 0
    for end in [*bounds.tolist(), len(samples)]:
        if end > start:
            yield samples[start:end]
        start = end


def _three(values: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = (round(float(value), 6) for value in values)
    return red, green, blue
