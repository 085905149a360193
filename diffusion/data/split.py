"""Which images of a source train and which test, in what order, and under what keys."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from diffusion.data.manifest import Split
from diffusion.data.sources.source import Source, SourceImage
from diffusion.errors import DataError
from diffusion.trust.redaction import shown

TEST_SHARE = 0.1


@dataclass(frozen=True)
class Chosen:
    """An image on its way to a shard."""

    key: str
    image: SourceImage
    label: int | None


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
    check_counts(source, {split: len(chosen) for split, chosen in splits.items()})
    for whole in splits.values():
        whole.sort(key=lambda one: hashlib.sha256(f"{one.key}.jpg".encode()).hexdigest())
    return splits


def check_counts(source: Source, counts: dict[Split, int], skipped: int = 0) -> None:
    """Raises DataError if there are too few images to test with."""
    if counts["test"] < 2 or counts["train"] < 1:
        left_out = f", of which {skipped:,} do not decode" if skipped else ""
        raise DataError(
            f"{source.name} has {len(source.images):,} images in {max(1, len(source.classes)):,} classes{left_out}: a tenth of each "
            "class is kept for testing, and that must be 2 images at least. Add images, or put all into one folder, without classes."
        )


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
