"""Pictures: grids of samples with their class names."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffusion.data.spec import ImageSpec

GRID_COLUMNS = 8
CELL = 96
GAP = 4
LABEL_WIDTH = 176
MOST_ROWS, PLAIN_ROWS = 20, 8
"""Rows with names, at most; rows without."""
BACKGROUND, INK = (255, 255, 255), (40, 40, 40)


def row_names(spec: ImageSpec, conditional: bool) -> list[str]:
    """The rows of a grid of samples: a row a class, or rows without a name where there are no classes, or too many."""
    if 1 <= len(spec.classes) <= MOST_ROWS:
        return list(spec.classes) if conditional else [""] * len(spec.classes)
    return [""] * PLAIN_ROWS


def by_class(spec: ImageSpec, conditional: bool) -> bool:
    """Whether grids have a row a class."""
    return any(row_names(spec, conditional))


def grid_caption(spec: ImageSpec, conditional: bool) -> str:
    """What to say of a grid of samples."""
    return "Samples, a row a class" if by_class(spec, conditional) else "Samples"


def class_grid(samples: NDArray[np.uint8], rows: list[str], at_least: int = CELL) -> Image.Image:
    """A grid with a labelled row a class: sample i lies in row i % len(rows), column i // len(rows).

    samples: [GRID_COLUMNS * len(rows), size, size, 3]; each pixel becomes a square, and a sample `at_least` that many wide.
    """
    size = samples.shape[1]
    cell = size * math.ceil(at_least / size)
    columns = len(samples) // len(rows)
    label_width = LABEL_WIDTH if any(rows) else 0
    extent = (label_width + columns * (cell + GAP) + GAP, len(rows) * (cell + GAP) + GAP)
    image = Image.new("RGB", extent, BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for row, name in enumerate(rows):
        top = GAP + row * (cell + GAP)
        draw.text((GAP * 2, top + cell / 2), name, INK, font, anchor="lm")
        for column in range(columns):
            patch = Image.fromarray(samples[column * len(rows) + row]).resize((cell, cell), Image.Resampling.NEAREST)
            image.paste(patch, (label_width + GAP + column * (cell + GAP), top))
    return image


def png(image: Image.Image) -> bytes:
    """The image as PNG."""
    data = io.BytesIO()
    image.save(data, "PNG")  # `optimize` takes seven times as long, and saves 2 %
    return data.getvalue()


def thumbnail(data: bytes, largest: int) -> bytes:
    """A PNG as WebP of at most `largest` pixels a side: small enough for a page."""
    image = Image.open(io.BytesIO(data))
    image.thumbnail((largest, largest))
    small = io.BytesIO()
    image.save(small, "WEBP", quality=90)
    return small.getvalue()
