"""Turn a source into a dataset version: shards in the store, and last of all the manifest that makes them one.

Images are read twice: once for the digest of their content, once, in the order of their names' hashes, for the shards. No more
than a few shards are in memory. What a killed ingestion has written is found again, shard by shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from diffusion.data import codecs
from diffusion.data.manifest import FORMAT_VERSION, Manifest, Shard, Split, parse_manifest
from diffusion.data.sealed import seal, unseal
from diffusion.data.shards import Sample, bytes_in_shard, write_shard
from diffusion.data.sources.source import Source, SourceImage
from diffusion.data.spec import LARGEST, MOST_BANDS, SMALLEST, DType, Images, ImageSpec, band_names, shown_bands
from diffusion.errors import DataError
from diffusion.randomness import stream
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.trust.redaction import shown

SHARD_BYTES = 4_000_000
TEST_SHARE = 0.1
MEASURED_IMAGES, MEASURED_PIXELS = 2000, 1024
"""Images, and pixels of each, by which levels are measured where they are not given."""
OUTSIDE, DARK, BRIGHT = 0.0005, 0.02, 0.98
"""Shares of pixels: beyond either end of the levels; below what pictures show as black, and as white."""
THREADED_BYTES = 32_000
"""Of an image's file, from which on threads help to decode; with smaller ones, most of it Python, they halve the speed."""
SMALLEST_STD = 1e-6
"""Of a band that is the same everywhere."""

Progress = Callable[[int, int], None]
"""Called with the images done and the images in all."""


def find_dataset(store: Store, digest: str) -> Manifest | None:
    """The dataset of that content digest, or None if the store does not hold it."""
    name = layout.manifest(digest)
    try:
        return parse_manifest(store.read(name), f"{store.uri}/{name}")
    except KeyError:
        return None


@dataclass(frozen=True)
class Chosen:
    """An image on its way to a shard."""

    key: str
    image: SourceImage
    label: int | None


@dataclass(frozen=True)
class Form:
    """What every image of a source must be, and how it lies in a shard."""

    size: int
    bands: int
    dtype: DType
    encoded_bytes: int | None
    """Bytes of an image in a shard, where it is not kept as it is."""


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
    form, low, high, black, white = _measure(source, splits)
    total, done = len(source.images), 0
    receipts: list[Receipt] = []
    with ThreadPoolExecutor(max_workers=4) as uploads:  # an upload waits for the network while the next shard is made
        pending = []
        for split, chosen in splits.items():
            for number, chunk in enumerate(_chunks(chosen, form, shard_bytes)):
                name = f"{split}-{number:05d}.tar"
                receipt = _find_receipt(store, folder, name, shard_bytes)
                if receipt is None:
                    receipt, data = _make_shard(name, split, chunk, source, form, (low, high))
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
    _check_counts(source, counts, sum(receipt.skipped for receipt in receipts))
    train = [receipt for receipt in receipts if receipt.shard.split == "train"]
    pixels = sum(receipt.shard.samples for receipt in train) * form.size**2
    mean = np.sum([receipt.sums for receipt in train], axis=0) / pixels
    std = np.sqrt(np.maximum(np.sum([receipt.squares for receipt in train], axis=0) / pixels - mean**2, 0))
    half = (high - low) / 2
    bands = source.options.bands or band_names(form.bands)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        digest=source.digest,
        source=source.name,
        licence=source.licence,
        images=ImageSpec(
            bands=bands,
            size=form.size,
            dtype=form.dtype,
            low=_numbers(low),
            high=_numbers(high),
            mean=_numbers((mean - low) / half - 1),
            std=_numbers(np.maximum(std / half, SMALLEST_STD)),
            shown=_shown(source, form),
            black=_numbers(black),
            white=_numbers(white),
            classes=source.classes,
        ),
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


def split_by_hash(source: Source) -> dict[Split, list[Chosen]]:
    """The tenth of each class whose file names have the smallest sha256 is the test split; the rest trains.

    Within a split the samples are in the order of their keys' hashes, which mixes the classes evenly over the shards. Raises
    DataError if there are too few images to test with.
    """
    splits: dict[Split, list[Chosen]] = {"train": [], "test": []}
    by_class: dict[str, list[SourceImage]] = {name: [] for name in source.classes or ("",)}
    for image in source.images:
        if image.class_name not in by_class:
            raise DataError(f"{source.name}: {shown(image.file_name)} has no class, and others have one.")
        by_class[image.class_name].append(image)
    key_of = _keys(source)
    for label, images in enumerate(by_class.values()):
        images.sort(key=lambda image: hashlib.sha256(image.file_name.encode()).hexdigest())
        cut = round(TEST_SHARE * len(images))
        parts: dict[Split, list[SourceImage]] = {"test": images[:cut], "train": images[cut:]}
        for split, chosen in parts.items():
            splits[split] += [Chosen(key_of(image), image, label if source.classes else None) for image in chosen]
    _check_counts(source, {split: len(chosen) for split, chosen in splits.items()})
    for whole in splits.values():
        whole.sort(key=lambda one: hashlib.sha256(f"{one.key}.jpg".encode()).hexdigest())
    return splits


def _check_counts(source: Source, counts: dict[Split, int], skipped: int = 0) -> None:
    if counts["test"] < 2 or counts["train"] < 1:
        left_out = f", of which {skipped:,} do not decode" if skipped else ""
        raise DataError(
            f"{source.name} has {len(source.images):,} images in {max(1, len(source.classes)):,} classes{left_out}: a tenth of each "
            "class is kept for testing, and that must be 2 images at least. Add images, or put all into one folder, without classes."
        )


def _folder(source: Source) -> str:
    return layout.dataset(source.digest)


def _keys(source: Source) -> Callable[[SourceImage], str]:
    """An image's key in a shard: its file's name, or class and name where two classes have the same name. No dots, no slashes."""

    def stem(image: SourceImage) -> str:
        return quote(image.file_name.rpartition(".")[0], safe="").replace(".", "%2E")

    unique = len({stem(image) for image in source.images}) == len(source.images)
    prefix = (
        (lambda image: "") if unique else (lambda image: f"{quote(image.class_name, safe='').replace('.', '%2E')}%2F")
    )

    def key(image: SourceImage) -> str:
        found = f"{prefix(image)}{stem(image)}"
        # A tar's header takes 100 characters.
        return found if len(found) <= 90 else f"{found[:40]}-{hashlib.sha256(found.encode()).hexdigest()[:40]}"

    return key


def _measure(
    source: Source, splits: dict[Split, list[Chosen]]
) -> tuple[Form, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """What the first image that decodes is like; levels, and what pictures show as black and white, by a part of the images."""
    options, first, kept = source.options, None, b""
    for one in splits["train"]:
        kept = one.image.read()
        try:
            first = _decoded(one.image, kept)
            break
        except DataError as error:
            _stop_unless_skipped(source, error)
    if first is None:
        raise DataError(f"None of the images of {source.name} decodes.")
    height, width, bands = first.shape
    if bands > MOST_BANDS:
        raise DataError(f"{shown(splits['train'][0].image.file_name)} has {bands} bands; {MOST_BANDS} are the most.")
    if options.bands and len(options.bands) != bands:
        raise DataError(f"The source options name {len(options.bands)} bands, and the images have {bands}.")
    if options.shown and not set(options.shown) <= set(options.bands or band_names(bands)):
        raise DataError(f"The bands are {', '.join(options.bands or band_names(bands))}: shown names another.")
    size = options.size or height
    if not options.size and (height != width or not SMALLEST <= size <= LARGEST):
        raise DataError(
            f"{shown(splits['train'][0].image.file_name)} has {width} x {height} pixels; square images of {SMALLEST} to {LARGEST} "
            'can be trained on. Say what to bring them to: -p source_options=\'{"size": 64, "fit": "crop"}\'.'
        )
    encoded = None
    if (height, width) != (size, size) or not (codecs.file_format(kept) in codecs.PILLOW and codecs.plain(kept)):
        encoded = len(codecs.to_npy(np.zeros((size, size, bands), first.dtype)))
    form = Form(size, bands, first.dtype.name, encoded)  # type: ignore[arg-type]  # decode gives no other
    shown_at = list(_shown(source, form))
    if options.levels:
        low, high = (np.full(bands, level) for level in options.levels)
    elif form.dtype == "uint8":
        low, high = np.zeros(bands), np.full(bands, 255.0)
    else:
        low, high = np.zeros(bands), np.zeros(bands)
    if form.dtype == "uint8":
        return form, low, high, low[shown_at], high[shown_at]
    ends, dark, bright = _percentiles(source, splits["train"], form)
    if not options.levels:
        low, high = ends
    return form, low, high, dark[shown_at], bright[shown_at]


def _shown(source: Source, form: Form) -> tuple[int, int, int]:
    bands, shown_of = source.options.bands or band_names(form.bands), source.options.shown
    if shown_of is None:
        return shown_bands(bands)
    red, green, blue = (bands.index(name) for name in shown_of)
    return red, green, blue


def _percentiles(source: Source, chosen: list[Chosen], form: Form):  # type: ignore[no-untyped-def]
    """Of some pixels of the first training images, whose order is that of a hash: ((low, high), dark, bright), each [bands]."""
    places = stream(0, "measured pixels").permutation(form.size**2)[:MEASURED_PIXELS]
    some = []
    for one in chosen[:MEASURED_IMAGES]:
        content = one.image.read()
        try:
            image = _fitted(_decoded(one.image, content), one.image, source, form)
            some.append(image.reshape(-1, form.bands)[places])
        except DataError as error:
            _stop_unless_skipped(source, error)
    if not some:
        raise DataError(f"None of the first {MEASURED_IMAGES:,} images of {source.name} decodes.")
    pixels = np.concatenate(some)
    quantiles = [np.quantile(pixels[:, band], (OUTSIDE, DARK, BRIGHT, 1 - OUTSIDE)) for band in range(form.bands)]
    low, dark, bright, high = np.array(quantiles, np.float64).T
    if form.dtype == "uint16":
        low, high = np.floor(low), np.ceil(high)
    high, bright = np.where(high > low, high, low + 1), np.where(bright > dark, bright, dark + 1)
    return (low, high), dark, bright


def _stop_unless_skipped(source: Source, error: DataError, more: str = "") -> None:
    if source.options.on_error == "stop":
        hint = 'To leave out and count what does not decode: -p source_options=\'{"on_error": "skip"}\'.'
        raise DataError(f"{error}{more} {hint}") from error


def _decoded(image: SourceImage, content: bytes) -> Images:
    return codecs.decode(content, f"{image.class_name}/{image.file_name}" if image.class_name else image.file_name)


def _fitted(array: Images, image: SourceImage, source: Source, form: Form) -> Images:
    """The image as its dataset has it. Raises DataError if it is of another kind or shape, and nothing was said about that."""
    name = shown(f"{image.class_name}/{image.file_name}".lstrip("/"))
    height, width, bands = array.shape
    if bands != form.bands or array.dtype != form.dtype:
        raise DataError(
            f"The image {name} has {bands} bands of {array.dtype}, and the first one {form.bands} of {form.dtype}. All images of a "
            "dataset must be alike: convert or leave out those that are not."
        )
    if (height, width) == (form.size, form.size):
        return array
    if source.options.fit is None:
        raise DataError(
            f"The image {name} has {width} x {height} pixels, expected {form.size} x {form.size}. Say how images are brought to one "
            f'size: -p source_options=\'{{"size": {form.size}, "fit": "crop"}}\' (or "stretch").'
        )
    if source.options.fit == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        array = array[top : top + side, left : left + side]
    resized = [
        np.asarray(Image.fromarray(band.astype(np.float32)).resize((form.size, form.size), Image.Resampling.LANCZOS))
        for band in np.moveaxis(array, -1, 0)
    ]
    levels = np.stack(resized, axis=-1)
    if form.dtype == "float32":
        return levels
    return np.clip(levels.round(), 0, np.iinfo(form.dtype).max).astype(form.dtype)


def _make_shard(
    name: str, split: Split, chunk: list[Chosen], source: Source, form: Form, levels: tuple[NDArray[np.float64], ...]
) -> tuple[Receipt, bytes]:
    low, high = (level[:, None] for level in levels)

    def prepare(one: Chosen) -> Prepared | DataError:
        content = one.image.read()
        if hashlib.sha256(content).hexdigest() != one.image.sha256:
            raise DataError(f"{shown(one.image.file_name)} of {source.name} changed while it was read. Start again.")
        try:
            array = _decoded(one.image, content)
            fitted = _fitted(array, one.image, source, form)
        except DataError as error:
            return error
        kind = codecs.file_format(content)
        if fitted is not array or kind not in codecs.PILLOW or not codecs.plain(content):
            content, kind = codecs.to_npy(fitted), "npy"
        # A row a band: sums along rows are ten times as fast as sums across them.
        pixels = fitted.reshape(-1, form.bands).T.astype(np.float64, order="C")
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
        _stop_unless_skipped(source, failed[0], more)
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


def _numbers(values: NDArray[np.float64]):  # type: ignore[no-untyped-def]
    return tuple(round(float(value), 6) for value in values)
