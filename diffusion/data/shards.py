"""Shards: plain WebDataset tars (`<key>.jpg`, `<key>.cls`), the same bytes whenever the same samples are written."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import DataError
from diffusion.trust.redaction import shown

BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """One labelled image as it lies in a shard. `label` indexes the manifest's classes."""

    key: str
    jpeg: bytes
    label: int


def write_shard(samples: Iterable[Sample]) -> bytes:
    """The tar of these samples. Names, order and contents decide its bytes; time, user and machine do not."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, content in (("jpg", sample.jpeg), ("cls", str(sample.label).encode())):
                header = tarfile.TarInfo(f"{sample.key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def bytes_in_shard(sample: Sample) -> int:
    """How many bytes a sample adds to its shard: two headers and two contents, padded to whole tar blocks."""
    return 2 * BLOCK + -(-len(sample.jpeg) // BLOCK) * BLOCK + BLOCK


def read_shard(data: bytes, where: str) -> list[Sample]:
    """The samples of a shard. Raises DataError if it is not a shard as `write_shard` makes them."""
    samples: list[Sample] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            jpegs: dict[str, bytes] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = data[member.offset_data : member.offset_data + member.size]
                if extension == "jpg":
                    jpegs[key] = content
                else:
                    samples.append(Sample(key, jpegs.pop(key), int(content)))
    except Exception as error:
        raise DataError(
            f"The shard {where} is damaged ({error}). Delete its dataset's folder and ingest again."
        ) from error
    return samples


def decode(jpeg: bytes, where: str, expected_size: int, image_size: int) -> NDArray[np.uint8]:
    """Decode one JPEG to RGB bytes [height, width, 3], averaged down by a whole factor to `image_size`.

    Raises DataError if it does not decode or is not `expected_size` x `expected_size`.
    """
    where = shown(where)
    with _decoder_errors(where):
        image: Image.Image = Image.open(io.BytesIO(jpeg), formats=("JPEG",))
    if image.size != (expected_size, expected_size):  # before it is decoded: a few bytes can mean gigabytes of pixels
        raise DataError(
            f"The image {where} has {image.size[0]} x {image.size[1]} pixels, expected {expected_size} x {expected_size}."
        )
    with _decoder_errors(where):
        image = image.convert("RGB")
    if image_size != expected_size:
        image = image.reduce(expected_size // image_size)
    return np.asarray(image)


@contextmanager
def _decoder_errors(where: str) -> Iterator[None]:
    """Turn whatever Pillow makes of a damaged or hostile image into a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"The image {where} does not decode as JPEG ({error}). Replace it by a whole copy.") from error


def decode_all(samples: Iterable[Sample], expected_size: int, image_size: int) -> NDArray[np.uint8]:
    """Decode many on all cores (the decoder releases the interpreter's lock): [samples, height, width, 3]."""
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda sample: decode(sample.jpeg, sample.key, expected_size, image_size), samples))
    return np.stack(images)
