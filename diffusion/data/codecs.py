"""Image files and the arrays that they hold: JPEG, PNG, WebP, TIFF and GeoTIFF, NPY, told apart by how they begin."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import DataError
from diffusion.trust.redaction import shown

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".npy")
MOST_BYTES = 256 << 20
"""Of an image's array: a few bytes of a file can mean gigabytes of pixels."""
MOST_PAGES = 256
"""Of a TIFF: a page may be a band, a mask or a smaller copy."""
PALETTE = 3
"""A TIFF's photometric interpretation."""
PLAIN, DEFLATE, PACKBITS, LZW, ZSTD = (1,), (8, 32946), (32773,), (5,), (50000,)
"""A TIFF's compressions that are read: those of which can be said what they unpack to before that much memory is taken."""
INSTRUMENTS = "avs bif eer fluoview lsm mdgel mmstack ndpi ndtiff nih ome philips qpi scanimage scn sis stk svs"
"""Kinds of TIFF that are read as if they were none."""
PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Formats that Pillow decodes, by the extension that they have in a shard."""
MODES = {"L": 1, "RGB": 3}
"""Pillow's modes of 8-bit images that need no conversion, and their bands."""
MOST_HEADER = 10_000
"""Characters of an NPY file's header."""
NPY_HEADER = (
    re.compile(r"""['"]descr['"]\s*:\s*u?['"]([<>|=]?[a-zA-Z]{1,12}\d{0,2})['"]"""),
    re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)"""),
    re.compile(r"""['"]shape['"]\s*:\s*\(([\d,L\s]{0,200})\)"""),
)
"""What a header says of type, order and shape: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html"""

Array = NDArray[Any]
"""An image, [height, width, bands]: uint8, uint16 or float32."""


def file_format(content: bytes) -> str:
    """The extension of the format that a file has; empty if it is none of ours."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    return "npy" if content[:6] == b"\x93NUMPY" else ""


class Decoded(NamedTuple):
    """The image of a file."""

    array: Array
    plain: bool
    """Whether the file's bytes can lie in a shard as they are: 8-bit grey or RGB of a format that Pillow decodes."""


def decode(content: bytes, where: str) -> Decoded:
    """The image of a file. Raises DataError, which names `where`, if it holds none that can be trained on."""
    kind = file_format(content)
    with decoder_errors(where, kind.upper() or "any of JPEG, PNG, WebP, TIFF, NPY"):
        if kind in PILLOW:
            return _from_pillow(content, kind)
        if kind == "tif":
            return Decoded(_usual(_from_tiff(content)), plain=False)
        if kind == "npy":
            return Decoded(_usual(_from_npy(content)), plain=False)
        raise ValueError("it begins like none")


@contextmanager
def decoder_errors(where: str, kind: str) -> Iterator[None]:
    """Turn whatever a decoder makes of a damaged or hostile image into a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"The image {shown(where)} does not decode as {kind} ({error}). Replace it by a whole copy."
        ) from error


def to_npy(image: Array) -> bytes:
    """The image as an NPY file: the same bytes every time."""
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(image), allow_pickle=False)
    return data.getvalue()


def open_plain(content: bytes, kind: str, bands: int, size: tuple[int, int], where: str) -> Image.Image:
    """An image of a shard, decoded. Raises DataError if it is not of that size (width, height)."""
    with decoder_errors(where, PILLOW[kind]):
        image = _open(content, kind)
    if image.size != size:  # before it is decoded
        raise DataError(
            f"The image {where} has {image.size[0]} x {image.size[1]} pixels, expected {size[0]} x {size[1]}."
        )
    with decoder_errors(where, PILLOW[kind]):
        return image.convert("L" if bands == 1 else "RGB")


def _open(content: bytes, kind: str) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=(PILLOW[kind],))
    _check_size(image.size[0] * image.size[1] * 4)
    return image


def _check_size(count: int) -> None:
    if count > MOST_BYTES:
        raise ValueError(f"it would take more than {MOST_BYTES >> 20} MiB")


def _from_pillow(content: bytes, kind: str) -> Decoded:
    if kind == "png" and content[24] == 16 and content[25] != 0:  # colours, or grey beside transparency
        raise ValueError("it has 16 bits a colour, which would be cut to 8: keep it as TIFF or NPY")
    image = _open(content, kind)
    if image.mode.startswith("I"):  # 16-bit grey
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError("it has levels beyond 16 bits")
        return Decoded(levels.astype(np.uint16)[..., None], plain=False)
    if image.mode == "F":
        return Decoded(np.asarray(image, np.float32)[..., None], plain=False)
    plain = image.mode in MODES
    if not plain:  # palettes, transparency (which is dropped), CMYK
        image = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    array = np.asarray(image)
    return Decoded(array[..., None] if array.ndim == 2 else array, plain)


def _from_tiff(content: bytes) -> Array:
    import tifffile

    _check_pages(content)
    # What the programs of instruments say in words, the library would believe: a few letters could mean gigabytes.
    plain: dict[str, Any] = {f"is_{kind}": False for kind in INSTRUMENTS.split()}
    with tifffile.TiffFile(io.BytesIO(content), **plain) as file:
        series = file.series[0]
        if series.keyframe.photometric == PALETTE:
            raise ValueError("its levels are numbers of colours in a table: write it as RGB")
        _check_size(series.nbytes)
        _check_segments(content, series)
        array, axes = series.asarray(), series.axes
    if array.ndim == 3 and not axes.endswith("S"):  # a plane a band
        array = np.moveaxis(array, 0, -1)
    return array


def _check_segments(content: bytes, series: Any) -> None:
    """Raises ValueError if the parts of an image unpack to more than an image may have: the decoder takes all they give."""
    total = 0
    for page in series.pages:
        if page is None:
            continue
        kind = int(page.compression)
        if kind not in PLAIN + DEFLATE + PACKBITS + LZW + ZSTD:
            raise ValueError(
                f"it is packed by {page.compression!r}: write it uncompressed, or with deflate, LZW or ZSTD"
            )
        for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
            total += _unpacked(memoryview(content)[offset : offset + size], kind, MOST_BYTES - total)
            _check_size(total)


def _unpacked(part: memoryview, kind: int, most: int) -> int:
    """Bytes that a part of a TIFF unpacks to, counted up to one more than `most`; of PackBits, which can't be many, the most."""
    import imagecodecs

    if kind in LZW:
        return len(imagecodecs.lzw_decode(bytes(part), out=most + 1))
    if kind in ZSTD:
        return len(imagecodecs.zstd_decode(bytes(part), out=most + 1))
    if kind in DEFLATE:
        return _deflated(part, most)
    return len(part) * (64 if kind in PACKBITS else 1)


def _deflated(part: memoryview, most: int) -> int:
    decoder, total = zlib.decompressobj(), 0
    while part and not decoder.eof and total <= most:
        total += len(decoder.decompress(part, 1 << 20))
        part = memoryview(decoder.unconsumed_tail)
    return total


def _check_pages(content: bytes) -> None:
    """Follow the chain of pages, which a damaged file may lead back to itself. Raises ValueError if it does not end."""
    order: Literal["little", "big"] = "little" if content[:2] == b"II" else "big"
    counter, entry, offset = (8, 20, 8) if b"+" in content[2:4] else (2, 12, 4)  # BigTIFF, TIFF

    def number(start: int, size: int) -> int:
        return int.from_bytes(content[start : start + size], order)

    page = number(offset, offset)
    for _ in range(MOST_PAGES):
        if not 0 < page < len(content):
            return
        page = number(page + counter + entry * number(page, counter), offset)
    raise ValueError(f"it has more than {MOST_PAGES} pages")


def _from_npy(content: bytes) -> Array:
    # Not by NumPy: Python's parser, which it asks, fails now and then in Python 3.11 where two threads use it.
    start = 10 if content[6] == 1 else 12
    end = start + int.from_bytes(content[8:start], "little")
    header = content[start : min(end, start + MOST_HEADER + 1)].decode("latin-1")
    found = [pattern.search(header) for pattern in NPY_HEADER]
    if content[6] > 3 or len(header) > MOST_HEADER or None in found:
        raise ValueError("its header is not that of an array of numbers")
    descr, order, sizes = (match[1] for match in found if match)
    dtype, shape = np.dtype(descr), tuple(int(size) for size in re.findall(r"\d+", sizes))
    count = math.prod(shape)
    _check_size(count * dtype.itemsize)
    levels: Array = np.frombuffer(content, dtype, count, offset=end)
    return levels.reshape(shape, order="F" if order == "True" else "C").copy()


def _usual(array: Array) -> Array:
    """[height, width, bands] of one of the three dtypes."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, not height, width, bands")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.int16 and array.min() >= 0:
        array = array.astype(np.uint16)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    if array.dtype.newbyteorder("=").name not in ("uint8", "uint16", "float32"):
        raise ValueError(f"its values are {array.dtype}: uint8, uint16 and float32 can be trained on")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("it holds NaN or infinity")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("="))
