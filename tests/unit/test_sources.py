"""Images of one's own: every way in gives the same dataset, and each kind of bad input a sentence."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gc
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from diffusion.data.codecs import decode, to_npy
from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.sources.find import find_archive, read_source
from diffusion.data.sources.own import name_of, read_own
from diffusion.data.sources.source import AS_IT_IS, Source, SourceImage, SourceOptions, make_source, parse_options
from diffusion.data.sources.tables import WEBDATASET
from diffusion.data.split import split_by_hash
from diffusion.errors import DataError, RecipeError, StoreError
from diffusion.pixels import Pixels
from diffusion.settings import settings
from diffusion.store.objects import FolderStore

CLASSES = ("field", "lake")


def picture(seed: int, size: tuple[int, int] = (16, 16), mode: str = "RGB", kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode).save(data, kind)
    return data.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 12 PNGs of 16 x 16."""
    for label, name in enumerate(CLASSES):
        place = tmp_path / "patches" / name
        place.mkdir(parents=True)
        for number in range(12):
            (place / f"{name}{number}.png").write_bytes(picture(100 * label + number))
    return tmp_path / "patches"


def read(path: Path, **options: Any) -> Source:
    return read_source(str(path), path, parse_options(options))


def made(path: Path, tmp_path: Path, **options: Any) -> tuple[Manifest, np.ndarray]:
    """The dataset of a source, and its training images."""
    store = FolderStore(tmp_path / "store")
    manifest = ingest(read(path, **options), store)
    images = ShardImages(store, manifest, "train", manifest.images.size, tmp_path / "copies")
    return manifest, np.concatenate([pixels for pixels, _ in images.all()])


def as_zip(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as file:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            file.write(path, path.relative_to(folder.parent))
    return target


def as_tar(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w:gz" if target.name.endswith("gz") else "w") as file:
        file.add(folder, folder.name)
    return target


def as_webdataset(folder: Path, target: Path) -> Path:
    for part in range(2):
        with tarfile.open(target / f"{part:03d}.tar", "w") as file:
            for path in sorted(folder.rglob("*.png"))[part::2]:
                for name, content in ((path.name, path.read_bytes()), (f"{path.stem}.txt", path.parent.name.encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))
    return Path(f"{WEBDATASET}{target}/{{000..001}}.tar")


def as_parquet(folder: Path, target: Path) -> Path:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    paths = sorted(folder.rglob("*.png"))
    table = pyarrow.table(
        {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
            "label": [CLASSES.index(path.parent.name) for path in paths],
        }
    )
    features = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), target)
    return target


def test_the_same_images_are_one_dataset_whatever_they_came_in(folder: Path, tmp_path: Path) -> None:
    expected = read(folder)
    assert expected.classes == CLASSES
    assert expected.name == "patches"
    containers = [
        as_zip(folder, tmp_path / "patches.zip"),
        as_tar(folder, tmp_path / "patches.tar"),
        as_tar(folder, tmp_path / "patches.tar.gz"),
        as_webdataset(folder, tmp_path),
        as_parquet(folder, tmp_path / "patches.parquet"),
    ]
    for container in containers:
        source = read(container)
        assert source.digest == expected.digest, container
        assert ingest(source, FolderStore(tmp_path / f"store-of-{container.name}")).images.classes == CLASSES


def test_images_keep_their_bytes_where_nothing_is_to_be_changed(folder: Path, tmp_path: Path) -> None:
    manifest, images = made(folder, tmp_path)
    assert (manifest.images.size, manifest.images.bands, manifest.images.dtype) == (
        16,
        ("red", "green", "blue"),
        "uint8",
    )
    assert manifest.splits == {"train": 22, "test": 2}
    originals = {np.asarray(Image.open(path)).tobytes() for path in folder.rglob("*.png")}
    assert {image.tobytes() for image in images} < originals


def test_one_folder_has_no_classes(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        path.rename(flat / path.name)
    manifest, images = made(flat, tmp_path)
    assert manifest.images.classes == ()
    assert len(images) == 22


def test_what_is_hidden_is_no_image_and_no_class(folder: Path, tmp_path: Path) -> None:
    before = read(folder).digest
    (folder / ".thumbs").mkdir()
    (folder / ".thumbs/x1.png").write_bytes(picture(99))
    (folder / "lake/.cache").mkdir()
    (folder / "lake/.cache/x2.png").write_bytes(picture(98))
    hidden = folder.rename(tmp_path / ".patches")
    with_folders = shutil.make_archive(str(tmp_path / "folders"), "zip", tmp_path, ".patches")
    for path in (
        hidden,
        as_zip(hidden, tmp_path / "hidden.zip"),
        as_tar(hidden, tmp_path / "hidden.tar"),
        Path(with_folders),
    ):
        assert read(path, name="patches").digest == before
    listed = tmp_path / "listed"
    shutil.copytree(hidden, listed / ".images")
    rows = [f".images/{name.relative_to(hidden)},a" for name in hidden.rglob("*.png")]
    (listed / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert len(read(listed, name="listed").images) == len(rows), "what a table names is meant"


def test_a_table_names_the_classes(folder: Path, tmp_path: Path) -> None:
    rows = [
        f"{path.relative_to(folder)},{'wet' if path.parent.name == 'lake' else 'dry'}" for path in folder.rglob("*.png")
    ]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert made(folder, tmp_path)[0].images.classes == ("dry", "wet")
    (folder / "metadata.csv").write_text("file_name,label\nlake/nothing.png,wet")
    with pytest.raises(DataError, match=r"line 2 of metadata.csv names lake/nothing.png"):
        read(folder)
    (folder / "metadata.csv").write_text("name,label\nlake/lake1.png,wet")
    with pytest.raises(DataError, match="no column with files"):
        read(folder)


def test_images_of_other_shapes_are_brought_to_one_size_if_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    (folder / "lake/lake0.png").write_bytes(picture(7, (24, 16)))
    (folder / "lake/lake1.png").write_bytes(picture(8, (40, 40)))
    with pytest.raises(DataError, match=r"pixels, expected 16 x 16.*fit"):
        made(folder, tmp_path)
    assert not [name for name in FolderStore(tmp_path / "store").names("") if name.endswith("manifest.json")]
    digests = {read(folder, size=16, fit=fit).digest for fit in ("crop", "stretch")} | {read(folder).digest}
    assert len(digests) == 3, "how images are fitted is part of what the dataset is"
    manifest, images = made(folder, tmp_path, size=16, fit="crop")
    assert images.shape[1:] == (16, 16, 3)
    assert manifest.images.size == 16


def test_cropping_takes_the_middle_and_stretching_all() -> None:
    from diffusion.data.form import Form, fitted
    from diffusion.data.sources.source import SourceImage

    image = SourceImage("", "x.png", "0" * 64, 0, bytes)
    array = np.zeros((16, 32, 1), np.uint16)
    array[:, :8], array[:, 24:] = 1000, 1000
    form = Form(16, 1, "uint16", None)
    for fit, outer in (("crop", 0), ("stretch", 1000)):
        source = Source("x", "", (), "0" * 64, SourceOptions(size=16, fit=fit))  # type: ignore[arg-type]
        found = fitted(array, image, source, form)
        assert found.shape == (16, 16, 1)
        assert found[0, 0, 0] == outer


@pytest.mark.parametrize(
    ("bands", "dtype"), [(1, "uint8"), (4, "uint8"), (13, "uint16"), (2, "float32"), (16, "uint16")]
)
@pytest.mark.parametrize("kind", ["tif", "npy"])
def test_bands_and_dtypes_come_back_as_they_were(tmp_path: Path, bands: int, dtype: str, kind: str) -> None:
    rng, written = np.random.default_rng(0), set()
    place = tmp_path / "bands"
    place.mkdir()
    for number in range(24):
        levels = rng.integers(0, 200, (16, 16, bands)).astype(dtype) / (7 if dtype == "float32" else 1)
        levels = levels.astype(dtype)
        if kind == "tif":
            layout: dict[str, Any] = {"planarconfig": "contig"} if bands > 1 else {}
            plane = levels if bands > 1 else levels[..., 0]
            tifffile.imwrite(place / f"{number}.tif", plane, photometric="minisblack", **layout)
        else:
            np.save(place / f"{number}.npy", levels)
        written.add(levels.tobytes())
    manifest, images = made(place, tmp_path)
    assert (len(manifest.images.bands), manifest.images.dtype) == (bands, dtype)
    assert {image.tobytes() for image in images} < written
    assert manifest.images.display(images).shape == (22, 16, 16, 3)
    assert manifest.images.counted == (dtype != "float32")


def test_threads_may_decode_npy_files_side_by_side() -> None:
    """Python 3.11's parser fails where the collector hands over to another thread in the midst of it."""
    content = to_npy(np.zeros((8, 8, 13), np.uint16))

    def deeper(frames: int) -> None:
        decode(content, "x") if frames == 0 else deeper(frames - 1)

    def hand_over(*_: object) -> None:
        time.sleep(0)

    often, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(20)
    gc.callbacks.append(hand_over)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(deeper, [0, 7, 14, 21] * 200))
    finally:
        gc.set_threshold(*often)
        gc.callbacks.remove(hand_over)
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8), (9, 7, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "<u2", ">u2", "<f4", ">f4", "<f8", "bool", "<i2"])
def test_an_npy_file_is_read_as_numpy_reads_it(shape: Any, order: Any, dtype: str) -> None:
    levels = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 90, shape).astype(dtype, order=order)
    file = io.BytesIO()
    np.save(file, levels)
    image = decode(file.getvalue(), "x").array
    expected = np.atleast_3d(levels) * (255 if dtype == "bool" else 1)
    assert np.array_equal(image, expected)
    with pytest.raises(DataError, match="NPY"):
        decode(file.getvalue()[:-1], "x")


@pytest.mark.parametrize(
    "descr",
    ["'|u1'", "'u1'", "'uint8'", "'B'", "u'|u1'", '"|u1"', "'<u2'", "'uint16'", "'=u2'", "'<f4'", "'f4'", "'float32'"],
)
@pytest.mark.parametrize(
    "said",
    [
        "{{'descr': {}, 'fortran_order': False, 'shape': (2, 2, 3)}}",
        "{{'shape':(2L,2L,3L),'descr':{},'fortran_order':False,}}",
    ],
)
def test_an_npy_file_of_another_writer_is_read_as_numpy_reads_it(descr: str, said: str) -> None:
    header = said.format(descr).ljust(117) + "\n"
    data = bytes(48)
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data
    with contextlib.suppress(ValueError):  # of Python 2's numbers
        expected = np.load(io.BytesIO(content))
        assert decode(content, "x").array.dtype == expected.dtype.newbyteorder("=")
    assert decode(content, "x").array.shape == (2, 2, 3)


@pytest.mark.parametrize("shape", ["(-1, 8, 8)", "(8, 8, -8)", "(8, 0, 8)", "(1 << 40,)", "(99999, 99999, 9)", "(8, 8"])
def test_an_npy_file_that_lies_about_its_shape_is_refused(shape: str) -> None:
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(1024)
    with pytest.raises(DataError, match="NPY"):
        decode(content, "x")


@pytest.mark.parametrize("packed", ["deflate", "lzw", "zstd", "packbits"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"byteorder": ">"}])
def test_a_tiff_is_unpacked(packed: Any, dtype: str, layout: Any) -> None:
    """As GDAL writes them: each value as its difference from the one before, in strips or tiles."""
    levels = np.random.default_rng(0).integers(0, 200, (40, 40, 5)).astype(dtype)
    predictor = None if packed == "packbits" else 3 if dtype == "float32" else 2
    file = io.BytesIO()
    plain: Any = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(file, levels, compression=packed, predictor=predictor, **plain, **layout)
    image = decode(file.getvalue(), "x").array
    assert image.dtype == dtype
    assert np.array_equal(image, levels)


def test_a_geotiff_of_thirteen_bands_is_shown_by_its_red_green_and_blue(tmp_path: Path) -> None:
    """As EuroSAT's patches with all bands are: pixel-interleaved, 16 bits, with the tags of a place."""
    from diffusion.data.sources.eurosat import CLASSES as EUROSAT_CLASSES

    rng = np.random.default_rng(0)
    for name in EUROSAT_CLASSES:
        (tmp_path / "EuroSAT_MS" / name).mkdir(parents=True)
        for number in range(10):
            levels = rng.integers(500, 3000, (64, 64, 13), np.uint16)
            place = (33550, "d", 3, (10.0, 10.0, 0.0), True)
            path = tmp_path / "EuroSAT_MS" / name / f"{name}_{number}.tif"
            tifffile.imwrite(path, levels, photometric="minisblack", planarconfig="contig", extratags=[place])
    manifest, images = made(tmp_path / "EuroSAT_MS", tmp_path)
    spec = manifest.images
    assert (manifest.source, spec.bands[-1], [spec.bands[b] for b in spec.shown]) == (
        "EuroSAT-MS",
        "B8A",
        ["B04", "B03", "B02"],
    )
    assert spec.classes == EUROSAT_CLASSES
    shown, red = spec.display(images), images[..., 3].astype(float)
    np.testing.assert_allclose(
        shown[..., 0], np.clip((red - spec.black[0]) / (spec.white[0] - spec.black[0]), 0, 1) * 255, atol=0.5
    )


def test_real_geotiffs_are_read(tmp_path: Path) -> None:
    archive = Path(__file__).resolve().parents[3] / "shared/data/EuroSAT_MS_270.zip"
    if not archive.exists():
        pytest.skip("the real 13-band patches are not here: the test above has drawn ones")
    manifest, _ = made(archive, tmp_path)
    assert (manifest.source, len(manifest.images.bands), sum(manifest.splits.values())) == ("EuroSAT-MS", 13, 270)


def bad_class_folder(folder: Path) -> None:
    (folder / "desert").mkdir()


def bad_band_count(folder: Path) -> None:
    (folder / "lake/lake0.png").write_bytes(picture(1, mode="L"))


def bad_image(folder: Path) -> None:
    for number in (0, 1):
        (folder / f"lake/lake{number}.png").write_bytes(b"hello")


def bad_sixteen_bit_colour(folder: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x10\x10\x02\0\0\0"
    (folder / "lake/lake0.png").write_bytes(header + bytes(100))


def bad_sixteen_bit_grey_and_transparent(folder: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x10\x10\x04\0\0\0"
    (folder / "lake/lake0.png").write_bytes(header + bytes(100))


def bad_palette(folder: Path) -> None:
    table = np.zeros((3, 256), np.uint16)
    (folder / "lake/lake0.png").unlink()
    tifffile.imwrite(folder / "lake/lake0.tif", np.zeros((16, 16), np.uint8), photometric="palette", colormap=table)


def bad_two_tables(folder: Path) -> None:
    for part in ("lake", "field"):
        (folder / part / "metadata.csv").write_text(f"file_name,label\n{part}0.png,a\n")


def bad_loose_image(folder: Path) -> None:
    (folder / "loose.png").write_bytes(picture(1))


def bad_two_of_one_key(folder: Path) -> None:
    (folder / "lake/lake0.webp").write_bytes(picture(1, kind="WEBP"))


def bad_name(folder: Path) -> None:
    with open(os.fsencode(folder / "lake") + b"/\xff\xfe.png", "wb") as file:
        file.write(picture(1))


def bad_split(folder: Path) -> None:
    for part in ("train", "Test"):
        shutil.copytree(folder, folder.parent / "whole" / part)
    shutil.rmtree(folder)
    (folder.parent / "whole").rename(folder)


def bad_empty(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.unlink()


def bad_nan(folder: Path) -> None:
    for path in list(folder.rglob("*.png")):
        levels = np.full((16, 16, 1), 0.5, np.float32)
        levels[0, 0] = np.nan
        path.unlink()
        np.save(path.with_suffix(".npy"), levels)


def bad_one_image(folder: Path) -> None:
    for path in list(folder.rglob("*.png"))[1:]:
        path.unlink()
    (folder / "field").rmdir() if not any((folder / "field").iterdir()) else (folder / "lake").rmdir()


def bad_pickle(folder: Path) -> None:
    for path in list(folder.rglob("*.png")):
        path.unlink()
        np.save(path.with_suffix(".npy"), np.array([{"code": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (bad_class_folder, "class folders without images: desert"),
        (bad_band_count, r"lake/lake0.png has 1 bands of uint8, and the first one 3|and the first one 1"),
        (bad_image, r"lake/lake[01].png does not decode.*1 more.*skip"),
        (bad_sixteen_bit_colour, "16 bits a colour"),
        (bad_sixteen_bit_grey_and_transparent, "16 bits a colour"),
        (bad_palette, "numbers of colours in a table"),
        (bad_two_tables, r"several tables: patches/field/metadata.csv, patches/lake/metadata.csv"),
        (bad_loose_image, r"beside them patches/loose.png"),
        (bad_two_of_one_key, "two images lake/lake0"),
        (bad_name, r"not UTF-8: lake/\\udcff\\udcfe.png"),
        (bad_empty, "holds no images"),
        (bad_split, "folders Test, train: parts of a dataset"),
        (bad_nan, "NaN or infinity"),
        (bad_one_image, "1 images in 1 classes"),
        (bad_pickle, "does not decode as NPY"),
    ],
)
def test_bad_input_is_named_and_leaves_no_dataset(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=said):
        made(folder, tmp_path)
    assert not FolderStore(tmp_path / "store").names("")


def test_a_class_with_one_image_is_trained_on(folder: Path, tmp_path: Path) -> None:
    (folder / "bog").mkdir()
    (folder / "bog/only.png").write_bytes(picture(99))
    manifest, images = made(folder, tmp_path)
    assert manifest.images.classes == ("bog", *CLASSES)
    assert len(images) == 23


def test_what_does_not_decode_is_left_out_and_counted_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    bad_image(folder)
    with pytest.raises(DataError, match=r"2 images of patches do not decode: more than 5.0%"):
        made(folder, tmp_path, on_error="skip", most_skipped=0.05)
    manifest, images = made(folder, tmp_path, on_error="skip", most_skipped=0.1)
    assert manifest.skipped == 2
    assert sum(manifest.splits.values()) == 22
    assert len(images) == manifest.splits["train"]


def test_the_image_that_is_named_is_the_one_that_was_looked_at(folder: Path, tmp_path: Path) -> None:
    """One before it in the list does not decode, and is left out."""
    training = split_by_hash(read(folder))["train"]
    paths = {f"{path.parent.name}/{path.name}": path for path in folder.rglob("*.png")}
    first, second = (paths[one.image.path] for one in training[:2])
    first.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    second.write_bytes(picture(1, (16, 12)))
    with pytest.raises(DataError, match=rf"{second.parent.name}/{second.name} has 16 x 12 pixels"):
        made(folder, tmp_path, on_error="skip", most_skipped=0.5)


def test_where_too_few_decode_there_is_no_dataset(folder: Path, tmp_path: Path) -> None:
    """The two test images are among those that do not decode."""
    for one in split_by_hash(read(folder))["test"]:
        (folder / one.image.class_name / one.image.file_name).write_bytes(b"hello")
    again = {one.image.file_name for one in split_by_hash(read(folder))["test"]}
    assert len(again) == 2, "which images are for testing is decided by their names alone"
    with pytest.raises(
        DataError, match=r"24 images in 2 classes, of which 2 do not decode: .* must be 2 images at least"
    ):
        made(folder, tmp_path, on_error="skip", most_skipped=0.5)
    assert not FolderStore(tmp_path / "store").names("")


def test_damaged_tables_and_tars_are_named(folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    with pytest.raises(DataError, match="no tar at"):
        read(Path(f"{WEBDATASET}pipe:touch {tmp_path}/ran"))
    assert not (tmp_path / "ran").exists()
    table = as_parquet(folder, tmp_path / "cut.parquet")
    table.write_bytes(table.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut.parquet is not a whole Parquet table"):
        read(table)
    whole = as_parquet(folder, tmp_path / "names.parquet")
    whole.write_bytes(whole.read_bytes().replace(b"label", b"\xff\xfebel"))
    with pytest.raises(DataError, match=r"names.parquet is not a whole Parquet table"):
        read(whole)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no column of images"):
        read(tmp_path / "text.parquet")


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_list_is_named(folder: Path, tmp_path: Path, label: int) -> None:
    from pyarrow import parquet

    known = parquet.read_table(as_parquet(folder, tmp_path / "patches.parquet"))
    labels = [label, *known["label"].to_pylist()[1:]]
    changed = known.set_column(1, "label", [labels])
    parquet.write_table(changed.replace_schema_metadata(known.schema.metadata), tmp_path / "patches.parquet")
    with pytest.raises(DataError, match=rf"a row has the label {label}, and there are {len(CLASSES)} classes"):
        read(tmp_path / "patches.parquet")


@pytest.mark.parametrize("kind", ["cut.tar", "cut.tar.gz", "001.tar"])
def test_a_tar_that_was_cut_off_is_refused_wherever_the_cut_is(folder: Path, tmp_path: Path, kind: str) -> None:
    """Also between two members, where it could be taken for a smaller one."""
    source = as_webdataset(folder, tmp_path) if kind == "001.tar" else as_tar(folder, tmp_path / kind)
    whole, cut = (tmp_path / kind).read_bytes(), tmp_path / kind
    expected = read(source).digest
    content = len(whole.rstrip(b"\0"))  # a tar ends with zeros, a part of which is enough
    places = [*range(0, content, 256), content - 1] if kind != "cut.tar.gz" else range(0, content - 64, 97)
    spoilt = [whole[:place] for place in places]
    if kind != "cut.tar.gz":
        with tarfile.open(cut) as archive:
            header = archive.getmembers()[4].offset
        spoilt.append(whole[:header] + b"x" * 512 + whole[header + 512 :])
    for data in spoilt:
        cut.write_bytes(data)
        with pytest.raises(DataError, match=f"{kind} is not a whole (WebDataset )?tar"):
            read(source)
    cut.write_bytes(whole)
    assert read(source).digest == expected


def test_a_tar_that_leads_out_of_its_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "out.tar", "w") as file:
        file.add(folder / "lake/lake0.png", "../out.png")
    with pytest.raises(DataError, match="points outside its folder"):
        read(tmp_path / "out.tar")


def test_links_in_a_tar_are_images_or_are_refused_and_never_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "lake/lake11.png").unlink()
    (folder / "lake/lake11.png").hardlink_to(folder / "field/field0.png")
    assert read(as_tar(folder, tmp_path / "hard.tar")).digest == read(folder).digest
    (folder / "lake/lake11.png").unlink()
    (folder / "lake/lake11.png").symlink_to(folder / "field/field0.png")
    assert len(read(folder).images) == 24
    with pytest.raises(DataError, match=r"lake11.png' is a link to .*--dereference"):
        read(as_tar(folder, tmp_path / "soft.tar"))


def test_a_zip_of_windows_has_the_same_folders(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "patches.zip", "w") as file:
        for path in folder.rglob("*.png"):
            member = zipfile.ZipInfo("x")
            member.filename = str(path.relative_to(folder.parent)).replace("/", "\\")  # its constructor would mend it
            file.writestr(member, path.read_bytes())
    assert read(tmp_path / "patches.zip").digest == read(folder).digest


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_that_was_packed_in_parts_is_whole(folder: Path, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    """As programs do that pack on several cores. Also where a part ends as a member does."""
    for size in (5000, 5 * tarfile.BLOCKSIZE):
        whole = as_tar(folder, tmp_path / "whole.tar").read_bytes()
        parts = [pack(whole[start : start + size]) for start in range(0, len(whole), size)]
        (tmp_path / "parts.tar.xz").write_bytes(b"".join(parts))
        assert read(tmp_path / "parts.tar.xz").digest == read(folder).digest
        samples = as_webdataset(folder, tmp_path)
        for tar in (tmp_path / "000.tar", tmp_path / "001.tar"):
            whole = tar.read_bytes()
            tar.write_bytes(b"".join(pack(whole[start : start + size]) for start in range(0, len(whole), size)))
        assert read(samples).digest == read(folder).digest


def test_a_disk_that_does_not_answer_for_a_moment_loses_no_shard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, source = FolderStore(tmp_path / "store"), read(folder)
    expected, opened, real = ingest(source, FolderStore(tmp_path / "other"), shard_bytes=6_000), [0], os.open

    def stale(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).startswith(str(folder)):
            opened[0] += 1
            if opened[0] == 20:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", stale)
    with pytest.raises(StoreError, match="can't be read: Stale file handle"):
        ingest(source, store, shard_bytes=6_000)
    written = [name for name in store.names("") if name.endswith(".tar")]
    assert written, "what was written is found again"
    assert ingest(source, store, shard_bytes=6_000) == expected


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, DataError), (errno.ESTALE, StoreError)])
def test_a_folder_that_can_t_be_listed_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    real = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("lake"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(kind, match=f"lake can't be read: {os.strerror(number)}"):
        read(folder)


@pytest.mark.parametrize("hidden", [".Trash-1000", "lost+found"])
def test_a_folder_that_holds_no_images_may_be_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hidden: str
) -> None:
    real, expected = os.scandir, read(folder).digest
    (folder / hidden).mkdir()

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith(hidden):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert read(folder).digest == expected


@pytest.mark.parametrize("kind", ["tar", "webdataset", "parquet"])
def test_a_disk_that_does_not_answer_is_no_damaged_archive(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = {
        "tar": lambda: as_tar(folder, tmp_path / "patches.tar"),
        "webdataset": lambda: as_webdataset(folder, tmp_path),
        "parquet": lambda: as_parquet(folder, tmp_path / "patches.parquet"),
    }[kind]()
    assert len(read(path).images) == 24

    def stale(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    if kind == "parquet":
        monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", stale)
    else:
        monkeypatch.setattr(tarfile.TarFile, "next", stale)
    with pytest.raises(StoreError, match="can't be read: Stale file handle"):
        read(path)


def test_tables_below_are_read_and_hidden_ones_passed_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tables/data").mkdir(parents=True)
    as_parquet(folder, tmp_path / "tables/data/0000.parquet")
    hidden = tmp_path / "tables/.ipynb_checkpoints"
    hidden.mkdir()
    as_parquet(folder, hidden / "0000.parquet")
    (tmp_path / "tables/data/._0000.parquet").write_bytes(b"no table")
    (tmp_path / "tables/latest").symlink_to(tmp_path / "tables/data")
    assert read(tmp_path / "tables").digest == read(folder).digest
    as_parquet(folder, folder / "lake/about.parquet")
    assert read(folder).classes == CLASSES, "a table beside images is none of images"


def test_images_of_tables_may_have_names_without_an_end_or_none_at_all(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    for part, name in (("train", "patch_{}"), ("test", None)):
        rows = [
            {"bytes": picture(seed), "path": name and name.format(seed)} for seed in range(12 * (1 + (part == "test")))
        ]
        (tmp_path / "tables" / part).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "tables" / part / "0000.parquet")
    names = {image.file_name for image in read(tmp_path / "tables").images}
    assert len(names) == 36
    assert {"patch_0.png", "test-0000-00000000.png"} <= names


def test_a_table_of_classes_may_be_written_with_blanks_and_capitals(folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    lines = ["File_Name, Label "]
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, flat)
        lines.append(f"{path.name}, {path.parent.name}{' ' * (len(lines) % 2)}")
    (flat / "metadata.csv").write_text("\n".join(lines))
    assert read(flat).classes == CLASSES
    (flat / "metadata.csv").write_text("\n".join(["file_name,label,Label"]))
    with pytest.raises(DataError, match="several columns label"):
        read(flat)


@pytest.mark.parametrize(("low", "high"), [(0.0, 3e-7), (4.0e-4, 4.015e-4), (-2e-9, 5e-9), (1e6, 1.001e6)])
def test_levels_in_physical_units_are_kept_as_they_are(tmp_path: Path, low: float, high: float) -> None:
    (tmp_path / "units").mkdir()
    for number in range(24):
        levels = np.random.default_rng(number).uniform(low, high, (16, 16, 1)).astype(np.float32)
        (tmp_path / f"units/{number}.npy").write_bytes(to_npy(levels))
    manifest, images = made(tmp_path / "units", tmp_path)
    (least,), (most,) = manifest.images.low, manifest.images.high
    assert np.isclose([least, most], [low, high], atol=0.01 * (high - low), rtol=0).all()
    assert ((images < least) | (images > most)).mean() < 0.003


def test_levels_that_no_image_can_have_are_refused_and_where_they_were_taken_do_no_harm(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="levels says 0 to 256, and the images are uint8: 0 to 255"):
        made(folder, tmp_path, levels=[0, 256])
    spec = made(folder, tmp_path)[0].images.model_copy(update={"high": (256.0, 256.0, 256.0)})
    assert (Pixels(spec).decode(torch.full((1, 3, 2, 2), 1e3)) == 255).all()


@pytest.mark.parametrize("called", ["EuroSAT", "EuroSAT-MS", "Generated fields and water"])
def test_other_images_never_get_the_name_of_a_known_dataset(folder: Path, tmp_path: Path, called: str) -> None:
    """Their models would stand among that dataset's."""
    source = read(folder.rename(tmp_path / called))
    assert re.fullmatch(rf"{name_of(Path(called))}-{source.digest[:8]}", source.name)
    for container in (
        as_parquet(tmp_path / called, tmp_path / f"{called}.parquet"),
        as_webdataset_called(tmp_path, called),
    ):
        assert read(container).name == source.name
    with pytest.raises(DataError, match="is that of a dataset which these images are not"):
        read(tmp_path / called, name=name_of(Path(called)).upper())


def as_webdataset_called(folder: Path, called: str) -> Path:
    pattern = as_webdataset(folder / called, folder)
    for tar in sorted(folder.glob("0*.tar")):
        tar.rename(folder / f"{called}-{tar.name}")
    return Path(str(pattern).replace("/{", f"/{called}-{{"))


def tar_of(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as file:
        for number, sample in enumerate(samples):
            for suffix, content in sample.items():
                header = tarfile.TarInfo(f"{number:03d}.{suffix}")
                header.size = len(content)
                file.addfile(header, io.BytesIO(content))
    return Path(f"{WEBDATASET}{path}")


def test_labels_are_text_or_whole_numbers_and_null_is_none(tmp_path: Path) -> None:
    def labelled(labels: list[Any]) -> Source:
        samples = [{"png": picture(n), "json": json.dumps({"label": x}).encode()} for n, x in enumerate(labels)]
        return read(tar_of(tmp_path / "labels.tar", samples))

    assert labelled(["wet", "dry"]).classes == ("dry", "wet")
    assert labelled([3, 4]).classes == ("3", "4")
    assert labelled([3.0, 4.0]).classes == ("3", "4")
    assert labelled([None, None]).classes == ()
    with pytest.raises(DataError, match="has no class, and others have one"):
        split_by_hash(labelled(["wet", None]))
    for wrong in (["wet"], {"a": 1}, 2.5):
        with pytest.raises(DataError, match="neither text nor a whole number"):
            labelled(["dry", wrong])
    with pytest.raises(DataError, match=r"a line break: a\\nb/001.png"):
        labelled(["dry", "a\nb"])
    with pytest.raises(DataError, match=r"not UTF-8: \\udc80/001.png"):
        labelled(["dry", "\udc80"])


def test_names_that_are_not_utf_8_are_said_in_tars_too(tmp_path: Path) -> None:
    path = tmp_path / "names.tar"
    tar_of(path, [{"png": picture(0)}, {"png": picture(1)}])
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[1]
    header = bytearray(data[member.offset : member.offset + 512])
    header[:3] = b"\xff\xfe\xfd"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(data[: member.offset] + header + data[member.offset + 512 :])
    for source in (path, Path(f"{WEBDATASET}{path}")):
        with pytest.raises(DataError, match=r"not UTF-8: \\udcff"):
            read(source)


def test_options_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no source option 'sise': did you mean 'size'"):
        parse_options({"sise": 64})
    with pytest.raises(RecipeError, match="size: "):
        parse_options({"size": 4})
    with pytest.raises(RecipeError, match="name the size"):
        parse_options({"fit": "crop"})
    with pytest.raises(DataError, match="name 2 bands, and the images have 3"):
        made(folder, tmp_path, bands=["a", "b"])
    with pytest.raises(DataError, match="has no options"):
        read_source("generated", folder, SourceOptions(size=32))
    with pytest.raises(DataError, match="There are no images at /no/such"):
        find_archive("/no/such", settings())
    assert read(folder, name="mine", licence="CC0").digest == read(folder).digest, "names change no image"


def test_an_ingestion_that_was_killed_goes_on_and_ends_with_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, again = FolderStore(tmp_path / "whole"), FolderStore(tmp_path / "again")
    expected = ingest(read(folder), whole, shard_bytes=6_000)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        ingest(read(folder), again, kill, shard_bytes=6_000)
    written = {
        name: (tmp_path / "again" / name).stat().st_mtime_ns for name in again.names("") if name.endswith(".tar")
    }
    assert 0 < len(written) < len(expected.shards)
    assert ingest(read(folder), again, shard_bytes=6_000) == expected
    assert again.names("") == whole.names("")
    assert all(again.read(name) == whole.read(name) for name in whole.names(""))
    assert all((tmp_path / "again" / name).stat().st_mtime_ns == before for name, before in written.items())


def test_no_more_than_a_few_shards_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 MB of images, made as they are asked for."""

    def content(number: int) -> bytes:
        return to_npy(np.random.default_rng(number).integers(0, 9000, (64, 64, 8), np.uint16))

    images = []
    for number in range(600):
        data = content(number)
        digest = hashlib.sha256(data).hexdigest()
        images.append(SourceImage("", f"{number}.npy", digest, len(data), partial(content, number)))
    source = make_source("streamed", "CC0", images)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # each thread holds an image or two
    tracemalloc.start()
    try:
        manifest = ingest(source, FolderStore(tmp_path / "store"), shard_bytes=1_600_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(shard.bytes for shard in manifest.shards) > 39e6
    assert peak < 26e6


def test_a_dataset_s_own_options_are_its_name_and_licence(folder: Path, tmp_path: Path) -> None:
    manifest, _ = made(folder, tmp_path, name="mine", licence="CC0")
    assert (manifest.source, manifest.licence) == ("mine", "CC0")
    assert read_own(folder, AS_IT_IS).licence == "not stated"
