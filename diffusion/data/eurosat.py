"""EuroSAT as a source: find the archive, read it without trusting it, and know by its content that it is EuroSAT.

Helber, Bischke, Dengel, Borth: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
Classification, IEEE JSTARS 2019.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from diffusion.errors import DataError

CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
IMAGE_SIZE = 64
EUROSAT_IMAGES = 27_000
EUROSAT_DIGEST = "76dd10d01f1fd8e92e83b7b338830f3f4ae8726ed2dbb388a797714e94c5a980"
LICENCE = "MIT, Copyright (c) Patrick Helber et al.; contains modified Copernicus Sentinel data"
TOP_FOLDERS = ("2750", "EuroSAT_RGB")

# The real archive holds 27,000 files of at most 20 kB. Anything far beyond is not EuroSAT and is not unpacked.
MAX_FILES = 100_000
MAX_FILE_BYTES = 1 << 20
MAX_TOTAL_BYTES = 1 << 30

# What zipfile raises for archives that are cut off, flipped, encrypted, or compressed in ways it does not know.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Mirror:
    """A public archive: where it lies and the md5 of its container."""

    url: str
    file_name: str
    md5: str


MIRRORS = (
    Mirror(
        "https://zenodo.org/records/7711810/files/EuroSAT_RGB.zip?download=1",
        "EuroSAT_RGB.zip",
        "f46e308c4d50d4bf32fedad2d3d62f3b",
    ),
    Mirror(
        "https://madm.dfki.de/files/sentinel/EuroSAT.zip",
        "EuroSAT.zip",
        "c8fa014336c82ac7804f0398fcb19387",
    ),
)


@dataclass(frozen=True)
class SourceImage:
    """One image of the source: its class, its file name, and its JPEG bytes as they are in the archive."""

    class_name: str
    file_name: str
    jpeg: bytes


@dataclass(frozen=True)
class Source:
    """All images of an archive, sorted by class and file name, with the digest of their content."""

    name: str
    licence: str
    images: tuple[SourceImage, ...]
    digest: str


def content_digest(images: tuple[SourceImage, ...]) -> str:
    """sha256 over the lines `<Class>/<file name> <sha256 of the file>`, sorted by name: the same for every container."""
    lines = sorted(
        f"{image.class_name}/{image.file_name} {hashlib.sha256(image.jpeg).hexdigest()}\n" for image in images
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_eurosat(path: Path) -> Source:
    """Read a EuroSAT zip or folder and prove by its content digest that it is the whole, unchanged data set.

    Raises DataError if the archive is missing, damaged, unsafe, or holds other images.
    """
    source = read_archive(path, name="EuroSAT", licence=LICENCE)
    if source.digest != EUROSAT_DIGEST:
        raise DataError(
            f"{path} is laid out like EuroSAT but holds other images: {len(source.images):,} images with content digest "
            f"{source.digest[:16]}…, expected {EUROSAT_IMAGES:,} with {EUROSAT_DIGEST[:16]}…. "
            f"Get the RGB archive again from {MIRRORS[0].url}"
        )
    return source


def read_archive(path: Path, name: str, licence: str) -> Source:
    """Read every JPEG of a zip or folder with the layout `2750/<Class>/` or `EuroSAT_RGB/<Class>/`.

    Raises DataError if the archive is missing, damaged, unsafe to unpack, or lacks one of the ten classes.
    """
    if not path.exists():
        raise DataError(f"No archive at {path}. Set EUROSAT_ARCHIVE to the EuroSAT zip or its unpacked folder.")
    files = _folder_files(path) if path.is_dir() else _zip_files(path)
    images = tuple(sorted(_images(path, files), key=lambda image: (image.class_name, image.file_name)))
    missing = sorted(set(CLASSES) - {image.class_name for image in images})
    if missing:
        raise DataError(
            f"{path} has no images of the class{'es' if len(missing) > 1 else ''} {', '.join(missing)}. Expected "
            f"folders like {TOP_FOLDERS[0]}/{CLASSES[0]}/ with JPEG images inside."
        )
    return Source(name=name, licence=licence, images=images, digest=content_digest(images))


def _images(path: Path, files: Iterator[tuple[PurePosixPath, Callable[[], bytes]]]) -> Iterator[SourceImage]:
    seen: set[tuple[str, str]] = set()
    for relative, read in files:
        if (
            relative.suffix.lower() != ".jpg"
            or relative.name.startswith(".")
            or len(relative.parts) < 2
            or relative.parts[-2] not in CLASSES
        ):
            continue
        if len(relative.parts) > 2 and relative.parts[-3] not in TOP_FOLDERS:
            continue
        key = (relative.parts[-2], relative.name)
        if key in seen:
            raise DataError(f"{path} holds {'/'.join(key)} twice, under different folders. Keep one copy.")
        seen.add(key)
        yield SourceImage(*key, read())


def _folder_files(folder: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    for directory, _, names in os.walk(folder):
        for name in names:
            file = Path(directory, name)
            # The folder itself may be the top one (`…/2750`): its own name is part of the layout.
            yield PurePosixPath(folder.name, *file.relative_to(folder).parts), file.read_bytes


def _zip_files(path: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            _refuse_unsafe(path, members)
            for member in members:
                if not member.is_dir():
                    yield PurePosixPath(member.filename), partial(_read_member, path, archive, member)
    except ZIP_ERRORS as error:
        raise _damaged(path, error) from error


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except ZIP_ERRORS as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is not a whole zip archive ({error}). It was probably cut off while it was copied: get it again."
    )


def _refuse_unsafe(path: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.filename.startswith(("/", "\\")) or ".." in PurePosixPath(member.filename.replace("\\", "/")).parts:
            raise DataError(
                f"{path} has a member that points outside its folder: '{member.filename}'. Do not trust it."
            )
        if member.file_size > MAX_FILE_BYTES and member.filename.lower().endswith(".jpg"):
            raise DataError(
                f"{path}: '{member.filename}' would expand to {member.file_size:,} bytes, "
                f"more than the {MAX_FILE_BYTES:,} that a 64 x 64 patch can need. This is not EuroSAT."
            )
    total = sum(member.file_size for member in members)
    if len(members) > MAX_FILES or total > MAX_TOTAL_BYTES:
        raise DataError(
            f"{path} would expand to {len(members):,} files and {total:,} bytes, more than {MAX_FILES:,} files or "
            f"{MAX_TOTAL_BYTES:,} bytes. This is not EuroSAT."
        )
