"""What the images of a source are like: size, bands, type, levels; and one of them, decoded and brought to that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.data import codecs
from diffusion.data.sources.source import Source, SourceImage
from diffusion.data.spec import LARGEST, MOST_BANDS, SMALLEST, DType, Images, band_names, shown_bands
from diffusion.data.split import Chosen
from diffusion.errors import DataError
from diffusion.randomness import stream
from diffusion.trust.redaction import shown

MEASURED_IMAGES, MEASURED_PIXELS = 2000, 1024
"""Images, and pixels of each, by which levels are measured where they are not given."""
OUTSIDE, DARK, BRIGHT = 0.0005, 0.02, 0.98
"""Shares of pixels: beyond either end of the levels; below what pictures show as black, and as white."""
ByBand = NDArray[np.float64]
"""[bands]"""


@dataclass(frozen=True)
class Form:
    """What every image of a source must be, and how it lies in a shard."""

    size: int
    bands: int
    dtype: DType
    encoded_bytes: int | None
    """Bytes of an image in a shard, where it is not kept as it is."""


@dataclass(frozen=True)
class Levels:
    """Levels of a source's images that mean something."""

    low: NDArray[np.float64]
    """What -1 means, by band."""
    high: NDArray[np.float64]
    """What 1 means, by band."""
    black: NDArray[np.float64]
    """What pictures show as black, in red, green and blue."""
    white: NDArray[np.float64]


def measure(source: Source, training: list[Chosen]) -> tuple[Form, Levels]:
    """What the first image that decodes is like, and levels by a part of the images.

    Raises DataError if it is none that can be trained on, or the source's options don't fit it.
    """
    options, found = source.options, None
    for one in training:
        try:
            found = decoded(one.image, one.image.read())
            break
        except DataError as error:
            stop_unless_skipped(source, error)
    if found is None:
        raise DataError(f"None of the images of {source.name} decodes.")
    first, named = found.array, shown(one.image.path)
    height, width, bands = first.shape
    if bands > MOST_BANDS:
        raise DataError(f"{named} has {bands} bands; {MOST_BANDS} are the most.")
    if options.bands and len(options.bands) != bands:
        raise DataError(f"The source options name {len(options.bands)} bands, and the images have {bands}.")
    if options.shown and not set(options.shown) <= set(options.bands or band_names(bands)):
        raise DataError(f"The bands are {', '.join(options.bands or band_names(bands))}: shown names another.")
    size = options.size or height
    if not options.size and (height != width or not SMALLEST <= size <= LARGEST):
        raise DataError(
            f"{named} has {width} x {height} pixels; square images of {SMALLEST} to {LARGEST} "
            'can be trained on. Say what to bring them to: -p source_options=\'{"size": 64, "fit": "crop"}\'.'
        )
    if options.levels and first.dtype.kind != "f":
        least, most = np.iinfo(first.dtype).min, np.iinfo(first.dtype).max
        if options.levels[0] < least or options.levels[1] > most:
            raise DataError(
                f"The source option levels says {options.levels[0]:g} to {options.levels[1]:g}, and the images are {first.dtype}: "
                f"{least} to {most}."
            )
    encoded = None
    if (height, width) != (size, size) or not found.plain:
        encoded = len(codecs.to_npy(np.zeros((size, size, bands), first.dtype)))
    form = Form(size, bands, first.dtype.name, encoded)  # type: ignore[arg-type]  # decode gives no other
    shown_at = list(shown_places(source, form))
    if options.levels:
        low, high = (np.full(bands, level) for level in options.levels)
    elif form.dtype == "uint8":
        low, high = np.zeros(bands), np.full(bands, 255.0)
    else:
        low, high = np.zeros(bands), np.zeros(bands)
    if form.dtype == "uint8":
        return form, Levels(low, high, low[shown_at], high[shown_at])
    ends, dark, bright = _percentiles(source, training, form)
    if not options.levels:
        low, high = ends
    return form, Levels(low, high, dark[shown_at], bright[shown_at])


def shown_places(source: Source, form: Form) -> tuple[int, int, int]:
    """The bands that pictures show as red, green and blue."""
    bands, shown_of = source.options.bands or band_names(form.bands), source.options.shown
    if shown_of is None:
        return shown_bands(bands)
    red, green, blue = (bands.index(name) for name in shown_of)
    return red, green, blue


def _percentiles(source: Source, chosen: list[Chosen], form: Form) -> tuple[tuple[ByBand, ByBand], ByBand, ByBand]:
    """Of some pixels of the first training images, whose order is that of a hash: ((low, high), dark, bright), each [bands]."""
    places = stream(0, "measured pixels").permutation(form.size**2)[:MEASURED_PIXELS]
    some = []
    for one in chosen[:MEASURED_IMAGES]:
        content = one.image.read()
        try:
            image = fitted(decoded(one.image, content).array, one.image, source, form)
            some.append(image.reshape(-1, form.bands)[places])
        except DataError as error:
            stop_unless_skipped(source, error)
    if not some:
        raise DataError(f"None of the first {MEASURED_IMAGES:,} images of {source.name} decodes.")
    pixels = np.concatenate(some)
    quantiles = [np.quantile(pixels[:, band], (OUTSIDE, DARK, BRIGHT, 1 - OUTSIDE)) for band in range(form.bands)]
    low, dark, bright, high = np.array(quantiles, np.float64).T
    if form.dtype == "uint16":
        low, high = np.floor(low), np.ceil(high)
    high, bright = np.where(high > low, high, low + 1), np.where(bright > dark, bright, dark + 1)
    return (low, high), dark, bright


def stop_unless_skipped(source: Source, error: DataError, more: str = "") -> None:
    """Raises the error, with what to do about it, unless the options say that such an image is left out."""
    if source.options.on_error == "stop":
        hint = 'To leave out and count what does not decode: -p source_options=\'{"on_error": "skip"}\'.'
        raise DataError(f"{error}{more} {hint}") from error


def decoded(image: SourceImage, content: bytes) -> codecs.Decoded:
    """The image. Raises DataError with its name."""
    return codecs.decode(content, image.path)


def fitted(array: Images, image: SourceImage, source: Source, form: Form) -> Images:
    """The image as its dataset has it. Raises DataError if it is of another kind or shape, and nothing was said about that."""
    name = shown(image.path)
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
