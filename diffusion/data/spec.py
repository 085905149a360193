"""What the images of a dataset are: bands, size, levels, classes. Made at ingest, kept in the manifest, handed to all above."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffusion.errors import DataError

SMALLEST, LARGEST, MOST_BANDS = 8, 256, 16
"""Pixels of a side, and bands, that an image can have."""

DType = Literal["uint8", "uint16", "float32"]
Images = NDArray[Any]
"""[images, height, width, bands], of the spec's dtype."""
Labels = NDArray[np.int64]
"""[samples], indices of a dataset's classes; zeros where there are none."""

Band = Annotated[str, Field(min_length=1, max_length=40)]
RGB = ("red", "green", "blue")
GREY = ("grey",)


KIND = ("bands", "dtype", "low", "high", "classes")
"""What a model's images have in common with those that it can be judged by, beside the size."""


class ImageSpec(BaseModel):
    """The images of a dataset. Every tuple of numbers has an entry a band."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    bands: tuple[Band, ...] = Field(min_length=1, max_length=MOST_BANDS)
    size: int = Field(ge=SMALLEST, le=LARGEST)
    """Height and width."""
    dtype: DType
    low: tuple[float, ...]
    """The level that -1 means; what lies below counts as it."""
    high: tuple[float, ...]
    """The level that 1 means; what lies above counts as it."""
    mean: tuple[float, ...]
    """Over the train split, levels in [-1, 1]."""
    std: tuple[float, ...]
    """Over the train split, levels in [-1, 1]."""
    shown: tuple[int, int, int]
    """The bands that pictures show as red, green and blue."""
    black: tuple[float, float, float]
    """Of the bands that are shown, the level that pictures show as black."""
    white: tuple[float, float, float]
    """And the one that they show as white."""
    classes: tuple[str, ...]
    """Their names in the order of their labels; none: the images have no classes."""

    @model_validator(mode="after")
    def _check(self) -> ImageSpec:
        for name in ("low", "high", "mean", "std"):
            if len(getattr(self, name)) != len(self.bands):
                raise ValueError(f"{name} has not one number a band")
        if len(set(self.bands)) != len(self.bands):
            raise ValueError("a band is named twice")
        if not all(0 <= band < len(self.bands) for band in self.shown):
            raise ValueError("a band that is shown is not there")
        if not all(low < high for low, high in zip((*self.low, *self.black), (*self.high, *self.white), strict=True)):
            raise ValueError("low must lie below high, and black below white")
        if not all(std > 0 for std in self.std):
            raise ValueError("std must be above zero")
        return self

    def check_alike(self, other: ImageSpec) -> None:
        """Raises DataError if a model of the other images can't be judged by these: only how they are distributed may differ."""
        if different := [name for name in ("size", *KIND) if getattr(self, name) != getattr(other, name)]:
            raise DataError(f"Its images are of another kind than these: they differ in {', '.join(different)}.")

    @property
    def kind(self) -> str:
        """Digest of what models have in common, beside the images' size, that can be judged by the same images."""
        return hashlib.sha256(json.dumps([getattr(self, name) for name in KIND]).encode()).hexdigest()

    @property
    def counted(self) -> bool:
        """Whether levels are whole numbers, so that images have a likelihood in bits."""
        return self.dtype != "float32"

    @property
    def bits_of_no_model(self) -> float:
        """Bits/dim of an even guess among all levels; infinite where they are not counted."""
        if not self.counted:
            return math.inf
        return float(np.mean([math.log2(high - low + 1) for low, high in zip(self.low, self.high, strict=True)]))

    def shape(self, size: int) -> tuple[int, int, int]:
        """[size, size, bands]"""
        return size, size, len(self.bands)

    def clipped(self, images: Images) -> Images:
        """The levels as a network sees and draws them: what lies beyond `low` and `high` counts as these."""
        return np.clip(images, np.array(self.low), np.array(self.high)).astype(self.dtype)

    def display(self, images: Images) -> NDArray[np.uint8]:
        """Images [..., height, width, bands] as people see them: 8-bit red, green and blue."""
        chosen = images[..., list(self.shown)]
        if self.dtype == "uint8" and self.black == (0, 0, 0) and self.white == (255, 255, 255):
            return np.ascontiguousarray(chosen)
        black, white = np.array(self.black), np.array(self.white)
        share = (chosen.astype(np.float64) - black) / (white - black)
        return (np.clip(share, 0, 1) * 255).round().astype(np.uint8)


def band_names(count: int) -> tuple[str, ...]:
    """What bands are called that nobody has named."""
    if count == len(GREY):
        return GREY
    return RGB if count == len(RGB) else tuple(f"band_{number}" for number in range(1, count + 1))


def shown_bands(bands: tuple[str, ...]) -> tuple[int, int, int]:
    """The bands that pictures show where nobody has said which: red, green and blue by name; else the first ones."""
    for names in (RGB, ("B04", "B03", "B02")):  # of Sentinel-2
        if set(names) <= set(bands):
            red, green, blue = (bands.index(name) for name in names)
            return red, green, blue
    return (0, 1, 2) if len(bands) >= 3 else (0, 0, 0)
