"""EuroSAT as a source: find the archive, read it without trusting it, and know by its content that it is EuroSAT.

Helber, Bischke, Dengel, Borth: EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
Classification, IEEE JSTARS 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffusion.data.sources.files import read_files
from diffusion.data.sources.limits import Limits, Meter
from diffusion.data.sources.own import read_own
from diffusion.data.sources.source import Source, SourceImage, SourceOptions, make_source
from diffusion.errors import DataError
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
MS_ARCHIVES = ("EuroSAT_MS.zip", "EuroSATallBands.zip")
"""Names of the archive that has all bands."""
MS_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
"""Of Sentinel-2, in the order of its files."""
MS_SHOWN = ("B04", "B03", "B02")

MAX_FILE_BYTES = 1 << 20
LIMITS = Limits(
    files=100_000,
    file_bytes=MAX_FILE_BYTES,
    total_bytes=1 << 30,
    directory_bytes=16 << 20,
    what="This is not EuroSAT.",
)
"""The real archive holds 27,000 files of at most 20 kB. Anything far beyond is not EuroSAT and is not unpacked."""


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
    """Read every JPEG in a folder with the name of a class, of a zip, tar or folder.

    Raises DataError if the archive is missing, damaged, unsafe to unpack, or lacks one of the ten classes.
    """
    if not path.exists():
        raise DataError(f"No archive at {path}. Set EUROSAT_ARCHIVE to the EuroSAT zip or its unpacked folder.")
    source = make_source(name, licence, _images(path), classes=CLASSES)
    missing = sorted(set(CLASSES) - {image.class_name for image in source.images})
    if missing:
        raise DataError(
            f"{path} has no images of the class{'es' if len(missing) > 1 else ''} {', '.join(missing)}. Expected "
            f"folders like {TOP_FOLDERS[0]}/{CLASSES[0]}/ with JPEG images inside."
        )
    return source


def read_eurosat_ms(path: Path, options: SourceOptions) -> Source:
    """EuroSAT's patches with all 13 bands of Sentinel-2: GeoTIFFs of 16 bits. Raises DataError like `read_own`."""
    named = {"name": options.name or "EuroSAT-MS", "licence": LICENCE}
    bands = {"bands": options.bands or MS_BANDS, "shown": options.shown or MS_SHOWN}
    return read_own(path, options.model_copy(update=named | bands))


def _images(path: Path) -> Iterator[SourceImage]:
    meter, seen = Meter(path, LIMITS), set[tuple[str, str]]()
    for relative, read in read_files(path, LIMITS, _is_patch):
        key = (relative.parts[-2], relative.name)
        if key in seen:
            raise DataError(f"{path} holds {shown('/'.join(key))} twice, under different folders. Keep one copy.")
        seen.add(key)
        content = meter.count(read())
        yield SourceImage.of(*key, content, read)


def _is_patch(name: PurePosixPath) -> bool:
    in_class = len(name.parts) > 1 and name.parts[-2] in CLASSES
    return in_class and name.suffix.lower() == ".jpg" and not name.name.startswith(".")
