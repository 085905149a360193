"""EuroSAT as a source: find the archive, read it without trusting it, and know by its content that it is EuroSAT.

Helber, Bischke, Dengel, Borth: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
Classification, IEEE JSTARS 2019.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from diffusion.errors import DataError
from diffusion.trust.reading import read_at_most, read_file
from diffusion.trust.redaction import shown

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

# The real archive holds 27,000 files of at most 20 kB. Anything far beyond is not EuroSAT and is not unpacked. The limits
# hold on what is read, from a zip or a folder, whatever an archive says of itself.
MAX_FILES = 100_000
MAX_FILE_BYTES = 1 << 20
MAX_TOTAL_BYTES = 1 << 30
MAX_DIRECTORY_BYTES = 16 << 20
"""Of a zip's own list of its files, which is read before anything else can be looked at."""
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Others may ask for gigabytes of memory for a few bytes."""


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
    images = tuple(sorted(_images(path, _counted(path, files)), key=lambda image: (image.class_name, image.file_name)))
    missing = sorted(set(CLASSES) - {image.class_name for image in images})
    if missing:
        raise DataError(
            f"{path} has no images of the class{'es' if len(missing) > 1 else ''} {', '.join(missing)}. Expected "
            f"folders like {TOP_FOLDERS[0]}/{CLASSES[0]}/ with JPEG images inside."
        )
    return Source(name=name, licence=licence, images=images, digest=content_digest(images))


File = tuple[PurePosixPath, Callable[[], bytes]]
"""Where a file lies in the archive, and how its content is read."""


def _counted(path: Path, files: Iterator[File]) -> Iterator[File]:
    """The same files, but no more of them, and no more of their bytes, than EuroSAT can have."""
    total = 0

    def counted(read: Callable[[], bytes]) -> bytes:
        nonlocal total
        content = read()
        total += len(content)
        if total > MAX_TOTAL_BYTES:
            raise _too_much(path)
        return content

    for number, (relative, read) in enumerate(files, start=1):
        if number > MAX_FILES:
            raise _too_much(path)
        yield relative, partial(counted, read)


def _too_much(path: Path) -> DataError:
    return DataError(f"{path} holds more than {MAX_FILES:,} files or {MAX_TOTAL_BYTES:,} bytes. This is not EuroSAT.")


def _images(path: Path, files: Iterator[File]) -> Iterator[SourceImage]:
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
            raise DataError(f"{path} holds {shown('/'.join(key))} twice, under different folders. Keep one copy.")
        seen.add(key)
        yield SourceImage(*key, read())


def _folder_files(folder: Path) -> Iterator[File]:
    for directory, _, names in os.walk(folder):
        for name in names:
            file = Path(directory, name)
            # The folder itself may be the top one (`…/2750`): its own name is part of the layout.
            yield PurePosixPath(folder.name, *file.relative_to(folder).parts), partial(read_file, file, MAX_FILE_BYTES)


def _zip_files(path: Path) -> Iterator[File]:
    with _zip_errors(path):
        archive = _open_zip(path)
    with archive:
        for member in archive.infolist():
            if not member.is_dir():
                yield PurePosixPath(member.filename), partial(_read_member, path, archive, member)


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    """Turn whatever zipfile makes of a damaged or hostile archive into a DataError: it lets a dozen kinds of errors through."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path} is not a whole zip archive ({type(error).__name__}: {error}). It was probably cut off while it was "
            "copied: get it again."
        ) from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open an archive and look at all its names before anything is unpacked."""
    if not path.is_file():
        raise DataError(f"{path} is neither a folder nor a file.")
    with path.open("rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile does it, which then reads that many bytes
    if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise _too_much(path)
    archive = zipfile.ZipFile(path)
    for member in archive.infolist():
        name = member.filename
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise DataError(f"{path} has a member that points outside its folder: '{shown(name)}'. Do not trust it.")
        if member.compress_type not in COMPRESSIONS:
            raise DataError(
                f"{path}: '{shown(name)}' is packed in a way that EuroSAT's archives never are. Pack it as plain zip."
            )
    return archive


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    with _zip_errors(path), archive.open(member) as file:
        return read_at_most(file, MAX_FILE_BYTES, f"{path}: '{shown(member.filename)}'")
