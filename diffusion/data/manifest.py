"""The manifest: what a dataset version consists of, down to the digest of each shard."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, model_validator

from diffusion.data.sealed import seal, unseal
from diffusion.data.spec import RGB, ImageSpec
from diffusion.errors import DataError
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.trust.identifiers import ObjectName, Sha256

FORMAT_VERSION = 2

Split = Literal["train", "test"]


class Shard(BaseModel):
    """One WebDataset tar of the dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ObjectName
    split: Split
    samples: NonNegativeInt
    bytes: NonNegativeInt
    sha256: Sha256


class Manifest(BaseModel):
    """A dataset version. `digest` is the content digest of its images, the same for every container they came in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    digest: Sha256
    source: ObjectName
    """The dataset's name."""
    licence: str
    images: ImageSpec
    splits: dict[Split, int]
    skipped: NonNegativeInt = 0
    """Images of the source that did not decode and were left out, where that was asked for."""
    shards: tuple[Shard, ...]

    @model_validator(mode="before")
    @classmethod
    def _first_format(cls, fields: Any) -> Any:
        """Format 1 knew 8-bit RGB images alone."""
        if not isinstance(fields, dict) or fields.get("format_version") != 1:
            return fields
        old = dict(fields)
        images = {
            "bands": RGB,
            "size": old.pop("image_size", None),
            "dtype": "uint8",
            "low": (0, 0, 0),
            "high": (255, 255, 255),
            "mean": old.pop("pixel_mean", None),
            "std": old.pop("pixel_std", None),
            "shown": (0, 1, 2),
            "black": (0, 0, 0),
            "white": (255, 255, 255),
            "classes": old.pop("classes", None),
        }
        return {**old, "format_version": FORMAT_VERSION, "images": images}

    def shards_of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in their stated order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> bytes:
        """The manifest's bytes, with a checksum of their own; equal manifests have equal bytes."""
        return seal(self)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest. Raises DataError if it is damaged, inconsistent, or of a format that this version can't read."""
    try:
        manifest = unseal(Manifest, data)
    except ValueError as error:
        raise DataError(f"The manifest {where} is damaged ({error}). Delete its folder and ingest again.") from error
    if manifest.format_version != FORMAT_VERSION:
        raise DataError(
            f"The manifest {where} has format {manifest.format_version}; this version reads up to {FORMAT_VERSION}. "
            "Ingest again."
        )
    for split, count in manifest.splits.items():
        if sum(shard.samples for shard in manifest.shards_of(split)) != count:
            raise DataError(f"The manifest {where} contradicts itself: its {split} shards do not hold {count} samples.")
    return manifest


def find_dataset(store: Store, digest: str) -> Manifest | None:
    """The dataset of that content digest, or None if the store does not hold it."""
    name = layout.manifest(digest)
    try:
        return parse_manifest(store.read(name), f"{store.uri}/{name}")
    except KeyError:
        return None


def require_dataset(store: Store, digest: str) -> Manifest:
    """The manifest of a dataset. Raises DataError if the store does not hold it."""
    found = find_dataset(store, digest)
    if found is None:
        raise DataError(f"The store {store.uri} has no dataset {digest}. Ingest it first.")
    return found
