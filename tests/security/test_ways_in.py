"""A few bytes that become gigabytes, and links, in each kind of source that people bring: little memory is enough to refuse them."""

from __future__ import annotations

import io
import itertools
import lzma
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from diffusion.data import codecs
from diffusion.data.sources import limits, own, tables, tars
from diffusion.data.sources.files import read_files
from diffusion.data.sources.find import read_source
from diffusion.data.sources.source import parse_options
from diffusion.errors import DataError
from tests.security.test_limits import little_memory

BIG = 100 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way of Linux")


def png(seed: int = 0) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(data, "PNG")
    return data.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def a_large_file(path: Path) -> str:
    with tarfile.open(path / "a-000.tar.gz", "w:gz", compresslevel=1) as archive:
        add(archive, "a.png", bytes(BIG))
    return f"webdataset:{path}/a-000.tar.gz"


def a_sample_of_many_files(path: Path) -> str:
    with tarfile.open(path / "a-000.tar", "w:gz", compresslevel=1) as archive:
        for number in range(20):
            add(archive, f"a.{number}.bin", bytes(BIG // 20))
    return f"webdataset:{path}/a-000.tar"


def xz_that_asks_for_memory(path: Path) -> str:
    with tarfile.open(path / "a.tar", "w") as archive:
        add(archive, "a/a.png", png())
    # A dictionary of 1.5 GB, of which it would be told that it needs it.
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = bytearray(lzma.compress((path / "a.tar").read_bytes(), filters=filters))
    at = packed.index(b"\x21\x01", 12) + 2  # LZMA2, one byte of properties: the dictionary's size
    packed[at] = 38
    header = 12, 12 + (packed[12] + 1) * 4
    packed[header[1] - 4 : header[1]] = zlib.crc32(packed[header[0] : header[1] - 4]).to_bytes(4, "little")
    (path / "a.tar.xz").write_bytes(packed)
    (path / "a.tar").unlink()
    return str(path / "a.tar.xz")


def a_table_of_very_many_lines(path: Path) -> str:
    with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/a.png", png())
        archive.writestr("a/metadata.csv", "file_name,label\n" + "a.png,x\n" * 1_000_000)
    return str(path / "a.zip")


@pytest.mark.parametrize(
    ("bomb", "said"),
    [
        (a_large_file, "holds more than"),
        (a_sample_of_many_files, "holds more than"),
        (xz_that_asks_for_memory, "Memory usage limit exceeded"),
        (a_table_of_very_many_lines, "more lines than there are images"),
    ],
)
def test_what_becomes_gigabytes(
    bomb: Callable[[Path], str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset  # noqa: F401  # which takes memory of its own

    source = bomb(tmp_path)
    small = replace(limits.Limits(), file_bytes=30 << 20, total_bytes=100 << 20)
    monkeypatch.setattr(tables, "LIMITS", small)
    monkeypatch.setattr(own, "LIMITS", small)
    monkeypatch.setattr(tars, "LZMA_BYTES", 70 << 20)
    with little_memory(150), pytest.raises(DataError, match=said):
        read_source(source, Path(source.removeprefix("webdataset:")), parse_options({}))


def test_a_row_that_stands_once_in_a_table_and_is_meant_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    size = 4 << 20
    rows = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 100, pyarrow.int32()), pyarrow.array([bytes(size)], pyarrow.binary())
    )
    parquet.write_table(
        pyarrow.table({"image": rows}), tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2 * size
    )
    del rows
    assert (tmp_path / "a.parquet").stat().st_size < size / 50
    monkeypatch.setattr(tables, "ROWS_BYTES", 2 * size)
    monkeypatch.setattr(tables, "LIMITS", replace(limits.Limits(), total_bytes=50 * size))
    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)
    pyarrow.set_memory_pool(pool)
    try:
        with pytest.raises(DataError, match="holds more than"):
            read_source("a.parquet", tmp_path / "a.parquet", parse_options({}))
        assert pool.max_memory() < 20 * size
    finally:
        pyarrow.set_memory_pool(usual)


@pytest.mark.parametrize(("form", "streams"), [(lzma.FORMAT_XZ, 1), (lzma.FORMAT_XZ, 2), (lzma.FORMAT_ALONE, 1)])
def test_an_honest_xz_is_read_whole(form: int, streams: int, tmp_path: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for number in range(30):
            add(archive, f"a/{number}.png", png(number))
    content = plain.getvalue()
    cut = [0, len(content) // 2, len(content)] if streams == 2 else [0, len(content)]
    packed = b"".join(lzma.compress(content[a:b], format=form) for a, b in itertools.pairwise(cut))
    (tmp_path / "a.tar.xz").write_bytes(packed)
    assert [read() for _, read in read_files(tmp_path / "a.tar.xz")] == [png(number) for number in range(30)]
    (tmp_path / "a.tar.xz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="whole tar"):
        list(read_files(tmp_path / "a.tar.xz"))


def test_what_is_not_wanted_of_a_tar_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a/a.png", png())
        add(archive, "a/notes.bin", bytes(1 << 20))
    kept, whole = list[int](), limits.Spool.keep

    def keep(self: limits.Spool, content: bytes) -> Callable[[], bytes]:
        kept.append(len(content))
        return whole(self, content)

    monkeypatch.setattr(limits.Spool, "keep", keep)
    (image,) = read_source(str(tmp_path / "a.tar"), tmp_path / "a.tar", parse_options({})).images
    assert image.read() == png()
    assert kept == [len(png())]


@pytest.mark.parametrize("kind", ["deflate", "lzma", "packbits", "lzw", "zstd", "overlapping"])
def test_a_tiff_whose_parts_become_gigabytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "MOST_BYTES", 1 << 20)
    zeros = zlib.compressobj(9)
    strip = {
        "deflate": zeros.compress(bytes(BIG)) + zeros.flush(),
        "lzma": lzma.compress(bytes(BIG // 10)),
        "packbits": b"\x81\0" * 10_000,
        "lzw": bytes(imagecodecs.lzw_encode(bytes(BIG))),
        "zstd": bytes(imagecodecs.zstd_encode(bytes(BIG))),
        "overlapping": bytes(192),
    }[kind]
    count = 10_000 if kind == "overlapping" else 1
    content = tiff_of(strip, COMPRESSIONS[kind], count)
    with little_memory(100), pytest.raises(DataError, match=r"would take more than|is packed by|buffer is too small"):
        codecs.decode(content, "x")


COMPRESSIONS = {"deflate": 8, "lzma": 34925, "packbits": 32773, "lzw": 5, "zstd": 50000, "overlapping": 1}


def tiff_of(strip: bytes, compression: int, count: int) -> bytes:
    """A grey image of 8 x 8, whose only strip is this; or with more of them, that say they are larger than they are."""
    data = io.BytesIO()
    with tifffile.TiffWriter(data) as file:
        if count == 1:
            file.write(iter([strip]), shape=(8, 8), dtype=np.uint8, compression=8, rowsperstrip=8)
        else:
            file.write(np.zeros((8 * count, 8), np.uint8), rowsperstrip=8)
    content = bytearray(data.getvalue())
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        tags = file.pages.first.tags
        kind, counts = tags["Compression"].valueoffset, tags["StripByteCounts"]
    content[kind : kind + 2] = compression.to_bytes(2, "little")
    if count > 1:
        large = len(strip).to_bytes(4 if counts.dtype == 4 else 2, "little") * count
        content[counts.valueoffset : counts.valueoffset + len(large)] = large
    return bytes(content)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_leads_nowhere(kind: bytes, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(7))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a/a.png", png())
        link = tarfile.TarInfo("a/b.png")
        link.type, link.linkname = kind, str(secret)
        archive.addfile(link)
    with pytest.raises(DataError, match="is a link to"):
        list(read_files(tmp_path / "a.tar"))


def test_a_link_in_a_zip_is_a_file_with_a_name_in_it(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(7))
    link = zipfile.ZipInfo("a/b.png")
    link.create_system, link.external_attr = 3, (0o120777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, str(secret))
    assert [read() for _, read in read_files(tmp_path / "a.zip")] == [os.fsencode(secret)]
