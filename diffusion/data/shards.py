"""Shards: plain WebDataset tars (`<key>.jpg`, `<key>.cls`), the same bytes whenever the same samples are written."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from diffusion.data import codecs
from diffusion.data.spec import Images, ImageSpec
from diffusion.errors import DataError
from diffusion.trust.redaction import shown

BLOCK = 512
END = bytes(BLOCK)
PLAIN = b"\0 0ustar\x0000"
"""In the header of a plain file: the end of the checksum, type, magic and version."""
LABEL = "cls"
EXTENSIONS = (*codecs.PILLOW, "npy")
"""Of images in a shard."""
AT_ONCE = 32
"""Images that a thread is handed at once: to hand each one over alone costs a part of what decoding it does."""


@dataclass(frozen=True)
class Sample:
    """One image as it lies in a shard."""

    key: str
    content: bytes
    label: int | None
    """Indexes the spec's classes; None where there are none."""
    extension: str = "jpg"


def write_shard(samples: Iterable[Sample]) -> bytes:
    """The tar of these samples. Names, order and contents decide its bytes; time, user and machine do not."""
    parts = []
    for sample in samples:
        files = [(sample.extension, sample.content)]
        if sample.label is not None:
            files.append((LABEL, str(sample.label).encode()))
        for extension, content in files:
            header = tarfile.TarInfo(f"{sample.key}.{extension}")
            header.size = len(content)
            # What TarFile.addfile writes, in a third of its time: that copies header and content first.
            parts += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % BLOCK)]
    parts.append(bytes(2 * BLOCK))
    parts.append(bytes(-sum(map(len, parts)) % tarfile.RECORDSIZE))
    return b"".join(parts)


def bytes_in_shard(size: int, labelled: bool) -> int:
    """How many bytes an image of `size` bytes adds to its shard: headers and contents, padded to whole tar blocks."""
    return BLOCK + -(-size // BLOCK) * BLOCK + (2 * BLOCK if labelled else 0)


def read_shard(data: bytes, where: str) -> list[Sample]:
    """The samples of a shard. Raises DataError if it is not a shard as `write_shard` makes them."""
    samples: list[Sample] = []
    try:
        for name, content in _files(data):
            key, _, extension = name.partition(".")
            if extension == LABEL:
                if not samples or samples[-1].key != key:
                    raise ValueError(f"the label of {shown(key)} does not follow its image")
                samples[-1] = replace(samples[-1], label=int(content))
            elif extension in EXTENSIONS:
                samples.append(Sample(key, content, None, extension))
            else:
                raise ValueError(f"it holds a file {shown(name)}")
    except Exception as error:
        raise DataError(
            f"The shard {where} is damaged ({error}). Delete its dataset's folder and ingest again."
        ) from error
    return samples


def _files(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a tar of plain files, in its order. `tarfile` takes three times as long.

    Of the format (POSIX.1-1988, "ustar") it reads what `write_shard` writes. Raises ValueError if it is anything else.
    """
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    files, headers, sums, at = list[tuple[str, bytes]](), list[int](), list[int](), 0
    while (header := data[at : at + BLOCK]) != END:
        if len(header) < BLOCK:
            raise ValueError("it has no end")
        size, total = header[124:135], header[148:154]
        if header[154:157] + header[257:265] != PLAIN or not (size.isdigit() and total.isdigit()):
            raise ValueError(f"it is no tar of plain files at byte {at}")
        headers.append(at // BLOCK)
        sums.append(int(total, 8))
        at, end = at + BLOCK, at + BLOCK + int(size, 8)
        if end > len(data):
            raise ValueError("a file in it is cut off")
        name, folder = (part.rstrip(b"\0").decode(errors="surrogateescape") for part in (header[:100], header[345:500]))
        files.append((f"{folder}/{name}" if folder else name, data[at:end]))
        at = -(-end // BLOCK) * BLOCK
    of_bytes = blocks[headers].sum(1, np.uint32) - blocks[headers, 148:156].sum(1, np.uint32) + 8 * ord(" ")
    if not np.array_equal(of_bytes, sums):
        raise ValueError("a checksum in it does not fit")
    return files


def decode(sample: Sample, spec: ImageSpec, size: int) -> Images:
    """The image of a sample, [size, size, bands], averaged down by a whole factor from the spec's size.

    Raises DataError if it does not decode or is not as the spec says.
    """
    where = shown(sample.key)
    if sample.extension in codecs.PILLOW:
        image = codecs.open_plain(sample.content, sample.extension, len(spec.bands), (spec.size, spec.size), where)
        if size != spec.size:
            image = image.reduce(spec.size // size)
        return np.asarray(image).reshape(size, size, len(spec.bands))
    array = codecs.decode(sample.content, where).array
    if array.shape != spec.shape(spec.size) or array.dtype != spec.dtype:
        raise DataError(
            f"The image {where} has shape {array.shape} and values {array.dtype}, expected {spec.shape(spec.size)} and {spec.dtype}."
        )
    return array if size == spec.size else averaged(array, size)


def averaged(image: Images, size: int) -> Images:
    """The image averaged down by a whole factor, rounded where its levels are whole numbers."""
    factor = len(image) // size
    mean = image.astype(np.float64).reshape(size, factor, size, factor, -1).mean(axis=(1, 3))
    return (mean.round() if image.dtype.kind == "u" else mean).astype(image.dtype)


def decode_all(samples: Iterable[Sample], spec: ImageSpec, size: int) -> Images:
    """Decode many on all cores (decoders release the interpreter's lock): [samples, size, size, bands]."""
    samples = list(samples)
    images = np.empty((len(samples), *spec.shape(size)), spec.dtype)

    def some(start: int) -> None:
        for index, sample in enumerate(samples[start : start + AT_ONCE], start):
            images[index] = decode(sample, spec, size)

    with ThreadPoolExecutor() as pool:
        list(pool.map(some, range(0, len(samples), AT_ONCE)))  # raises the first error
    return images
