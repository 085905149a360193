"""Turn a source into a dataset version: shards in the store, and last of all the manifest that makes them one.

Images are read twice: once for the digest of their content, once, in the order of their names' hashes, for the shards. No more
than a few shards are in memory. What a killed ingestion has written is found again, shard by shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from diffusion.data import codecs
from diffusion.data.form import Form, Levels, decoded, fitted, measure, shown_places, stop_unless_skipped
from diffusion.data.manifest import FORMAT_VERSION, Manifest, Shard, Split, find_dataset
from diffusion.data.sealed import seal, unseal
from diffusion.data.shards import Sample, bytes_in_shard, write_shard
from diffusion.data.sources.source import Source
from diffusion.data.spec import ImageSpec, band_names
from diffusion.data.split import Chosen, check_counts, split_by_hash
from diffusion.errors import DataError
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.trust.redaction import shown

SHARD_BYTES = 4_000_000
THREADED_BYTES = 32_000
"""Of an image's file, from which on threads help to decode; with smaller ones, most of it Python, they halve the speed."""
SMALLEST_STD = 1e-6
"""Of a band that is the same everywhere."""

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""


@dataclass(frozen=True)
class Prepared:
    """An image as its shard holds it, with the sums of its levels and of their squares, by band."""

    sample: Sample
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]


class Receipt(BaseModel):
    """What is remembered of a shard that has been written: beside it, until the manifest is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: Shard
    skipped: int
    sums: tuple[float, ...]
    """Of the levels, by band."""
    squares: tuple[float, ...]


def ingest(source: Source, store: Store, progress: Progress | None = None, shard_bytes: int = SHARD_BYTES) -> Manifest:
    """Write `source` into `store` as WebDataset shards and return its manifest. Writes nothing if it is there already.

    Every image is decoded once, so that a damaged one is found here and not in training. Raises DataError for an image
    that does not decode or is not like the first one, StoreError if the store can't be written; without its manifest a
    half-written dataset is none.
    """
    found = find_dataset(store, source.digest)
    if found is not None:
        return found
    try:
        return _ingest(source, store, progress, shard_bytes)
    except DataError:  # these images never become a dataset: what was written of them is of no use
        if find_dataset(store, source.digest) is None:
            for name in store.names(f"{_folder(source)}/"):
                store.delete(name)
        raise


def _ingest(source: Source, store: Store, progress: Progress | None, shard_bytes: int) -> Manifest:
    folder = _folder(source)
    splits = split_by_hash(source)
    form, levels = measure(source, splits["train"])
    total, done = len(source.images), 0
    receipts: list[Receipt] = []
    with ThreadPoolExecutor(max_workers=4) as uploads:  # an upload waits for the network while the next shard is made
        pending = []
        for split, chosen in splits.items():
            for number, chunk in enumerate(_chunks(chosen, form, shard_bytes)):
                name = f"{split}-{number:05d}.tar"
                receipt = _find_receipt(store, folder, name, shard_bytes)
                if receipt is None:
                    receipt, data = _make_shard(name, split, chunk, source, form, levels)
                    pending.append(uploads.submit(_write, store, folder, receipt, data, shard_bytes))
                    while len(pending) > 4:
                        pending.pop(0).result()
                receipts.append(receipt)
                _check_skipped(source, sum(receipt.skipped for receipt in receipts))
                done += len(chunk)
                if progress:
                    progress(done, total)
        for upload in pending:
            upload.result()
    counts = {split: sum(r.shard.samples for r in receipts if r.shard.split == split) for split in splits}
    check_counts(source, counts, sum(receipt.skipped for receipt in receipts))
    train = [receipt for receipt in receipts if receipt.shard.split == "train"]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        digest=source.digest,
        source=source.name,
        licence=source.licence,
        images=_spec(source, form, levels, train),
        splits=counts,
        skipped=sum(receipt.skipped for receipt in receipts),
        shards=tuple(receipt.shard for receipt in receipts if receipt.shard.samples),
    )
    if not store.create(layout.manifest(source.digest), manifest.to_json()):
        store.write(layout.manifest(source.digest), manifest.to_json())  # over a damaged one
    for name in store.names(f"{folder}/"):
        if name.endswith(".receipt.json"):
            store.delete(name)
    return manifest


def _spec(source: Source, form: Form, levels: Levels, train: list[Receipt]) -> ImageSpec:
    pixels = sum(receipt.shard.samples for receipt in train) * form.size**2
    mean = np.sum([receipt.sums for receipt in train], axis=0) / pixels
    std = np.sqrt(np.maximum(np.sum([receipt.squares for receipt in train], axis=0) / pixels - mean**2, 0))
    half = (levels.high - levels.low) / 2
    return ImageSpec(
        bands=source.options.bands or band_names(form.bands),
        size=form.size,
        dtype=form.dtype,
        low=_levels(levels.low),
        high=_levels(levels.high),
        mean=_numbers((mean - levels.low) / half - 1),
        std=_numbers(np.maximum(std / half, SMALLEST_STD)),
        shown=shown_places(source, form),
        black=_levels(levels.black),
        white=_levels(levels.white),
        classes=source.classes,
    )


def _folder(source: Source) -> str:
    return layout.dataset(source.digest)


def _make_shard(
    name: str, split: Split, chunk: list[Chosen], source: Source, form: Form, levels: Levels
) -> tuple[Receipt, bytes]:
    low, high = levels.low[:, None], levels.high[:, None]

    def prepare(one: Chosen) -> Prepared | DataError:
        content = one.image.read()
        if hashlib.sha256(content).hexdigest() != one.image.sha256:
            raise DataError(f"{shown(one.image.file_name)} of {source.name} changed while it was read. Start again.")
        try:
            found = decoded(one.image, content)
            brought = fitted(found.array, one.image, source, form)
        except DataError as error:
            return error
        kind = codecs.file_format(content)
        if brought is not found.array or not found.plain:
            content, kind = codecs.to_npy(brought), "npy"
        # A row a band: sums along rows are ten times as fast as sums across them.
        pixels = brought.reshape(-1, form.bands).T.astype(np.float64, order="C")
        np.clip(pixels, low, high, out=pixels)
        sums = pixels.sum(axis=1)
        return Prepared(Sample(one.key, content, one.label, kind), sums, np.square(pixels, out=pixels).sum(axis=1))

    if sum(one.image.size for one in chunk) < THREADED_BYTES * len(chunk):
        made = list(map(prepare, chunk))
    else:
        with ThreadPoolExecutor() as pool:
            made = list(pool.map(prepare, chunk))
    failed = [error for error in made if isinstance(error, DataError)]
    if failed:
        more = f" {len(failed) - 1:,} more of the {len(chunk):,} beside it are bad, too." if len(failed) > 1 else ""
        stop_unless_skipped(source, failed[0], more)
    good = [one for one in made if not isinstance(one, DataError)]
    none = np.zeros(form.bands)
    sums, squares = sum((one.sums for one in good), none), sum((one.squares for one in good), none)
    data = write_shard(one.sample for one in good)
    digest = hashlib.sha256(data).hexdigest()
    shard = Shard(name=name, split=split, samples=len(good), bytes=len(data), sha256=digest)
    return Receipt(shard=shard, skipped=len(failed), sums=tuple(sums.tolist()), squares=tuple(squares.tolist())), data


def _write(store: Store, folder: str, receipt: Receipt, data: bytes, shard_bytes: int) -> None:
    if receipt.shard.samples:
        store.write(f"{folder}/{receipt.shard.name}", data)
    store.write(_receipt_name(folder, receipt.shard.name, shard_bytes), seal(receipt))


def _find_receipt(store: Store, folder: str, name: str, shard_bytes: int) -> Receipt | None:
    """What an ingestion that was killed wrote, shard and receipt, the shard first; None if it is to be written (again)."""
    try:
        return unseal(Receipt, store.read(_receipt_name(folder, name, shard_bytes)))
    except (KeyError, ValueError):
        return None


def _receipt_name(folder: str, name: str, shard_bytes: int) -> str:
    return f"{folder}/{name}.{shard_bytes}.receipt.json"


def _check_skipped(source: Source, skipped: int) -> None:
    most = source.options.most_skipped * len(source.images)
    if skipped > most:
        raise DataError(
            f"{skipped:,} images of {source.name} do not decode: more than {source.options.most_skipped:.1%} of them "
            "(the source option most_skipped)."
        )


def _chunks(chosen: list[Chosen], form: Form, shard_bytes: int) -> Iterator[list[Chosen]]:
    """Cut a split into shards of about that many bytes, as even as can be."""
    if not chosen:
        return
    sizes = np.cumsum([bytes_in_shard(form.encoded_bytes or one.image.size, one.label is not None) for one in chosen])
    count = max(1, round(sizes[-1] / shard_bytes))
    bounds = np.searchsorted(sizes, np.linspace(0, sizes[-1], count + 1)[1:-1])
    start = 0
    for end in [*bounds.tolist(), len(chosen)]:
        if end > start:
            yield chosen[start:end]
        start = end


def _numbers(values: NDArray[np.float64]) -> Any:  # of as many as the field of a spec wants
    return tuple(round(float(value), 6) for value in values)


def _levels(values: NDArray[np.float64]) -> Any:
    """Levels as a spec has them: to six digits behind the point, or to nine digits where they are small, as physical units may be."""
    return tuple(float(f"{value:.9g}") if abs(value) < 1 else round(float(value), 6) for value in values)
