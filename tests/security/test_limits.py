"""Limits hold on what is read, whatever is declared, on every way in: zips, folders, images, downloads, JSON, the store."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import resource
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from diffusion.data import codecs
from diffusion.data.sealed import unseal
from diffusion.data.shards import Sample, decode
from diffusion.data.sources import download, eurosat, tables, transfer
from diffusion.data.sources.download import download_eurosat
from diffusion.data.sources.eurosat import MAX_FILE_BYTES, Mirror, read_archive
from diffusion.data.sources.own import read_own
from diffusion.data.sources.source import AS_IT_IS
from diffusion.errors import DataError, StoreError
from diffusion.store.objects import FolderStore
from diffusion.training.checkpoint import load_latest
from diffusion.training.state import CheckpointState
from diffusion.trust.reading import parse_json
from tests.conftest import Ingested
from tests.specs import RGB_SPEC

MEMBER = "2750/Forest/Forest_1.jpg"


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """Whatever asks for much more memory than there was ends as MemoryError.

    Readers turn that into a DataError like any other trouble: tests look for the sentence of the limit that they are about.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way of Linux")
@pytest.mark.parametrize(
    ("compression", "said"),
    [
        (zipfile.ZIP_DEFLATED, "Bad CRC-32"),  # of the bytes up to the size that it declares: no more are unpacked
        (zipfile.ZIP_LZMA, "packed in a way that is not read"),
        (zipfile.ZIP_BZIP2, "packed in a way that is not read"),
    ],
)
def test_a_small_zip_that_becomes_gigabytes(tmp_path: Path, compression: int, said: str) -> None:
    bomb, size = tmp_path / "bomb.zip", (120 if compression == zipfile.ZIP_DEFLATED else 1) << 20
    with zipfile.ZipFile(bomb, "w", compression) as file, file.open(MEMBER, "w") as member:
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    data = bomb.read_bytes()
    bomb.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    with little_memory(60), pytest.raises(DataError, match=said):
        read_archive(bomb, "x", "y")


def test_a_zip_whose_list_of_files_is_the_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = tmp_path / "many.zip"
    with zipfile.ZipFile(many, "w") as file:
        for number in range(300):
            file.writestr(f"2750/Forest/{number}.txt", b"")
    monkeypatch.setattr(eurosat, "LIMITS", replace(eurosat.LIMITS, directory_bytes=10_000))
    with pytest.raises(DataError, match="This is not EuroSAT"):
        read_archive(many, "x", "y")


def test_many_small_files_are_counted_in_a_zip_and_in_a_folder(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    for limits in (replace(eurosat.LIMITS, files=50), replace(eurosat.LIMITS, total_bytes=10_000)):
        with monkeypatch.context() as patch:
            patch.setattr(eurosat, "LIMITS", limits)
            for path in (archive, tmp_path / "2750"):
                with pytest.raises(DataError, match="holds more than"):
                    read_archive(path, "x", "y")


@pytest.mark.parametrize("kind", ["pipe", "device", "huge", "socket", "loop"])
def test_a_folder_with_what_is_no_file(archive: Path, tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    path = tmp_path / "2750/Forest/Forest_9999.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "socket":
        import socket

        here = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(DataError, match="Forest_9999"):
        read_archive(tmp_path / "2750", "x", "y")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_what_is_named_jpg_and_is_none_is_not_decoded(kind: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, kind)
    with pytest.raises(DataError, match="does not decode as JPEG"):
        decode(Sample("x", data.getvalue(), 0), RGB_SPEC, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way of Linux")
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_pages_of_a_tiff_that_lead_back_to_themselves_come_to_an_end(bigtiff: bool, order: Any) -> None:
    whole = io.BytesIO()
    tifffile.imwrite(whole, np.zeros((8, 8, 5), np.uint16), planarconfig="contig", bigtiff=bigtiff, byteorder=order)
    content = bytearray(whole.getvalue())
    assert codecs.decode(bytes(content), "x").array.shape == (8, 8, 5)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page, tags = file.pages.first.offset, len(file.pages.first.tags)
    size, end = (8, page + 8 + 20 * tags) if bigtiff else (4, page + 2 + 12 * tags)
    content[end : end + size] = page.to_bytes(size, "little" if order == "<" else "big")
    with pytest.raises(DataError, match="more than 256 pages"):
        codecs.decode(bytes(content), "x")


def test_the_size_of_an_image_is_looked_at_before_it_is_decoded() -> None:
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "JPEG")
    # The frame's header says 8,200 x 8,200, which Pillow would decode: to 192 MiB, and 256 with a fourth byte a pixel.
    content = data.getvalue()
    at = content.index(b"\xff\xc0") + 5
    content = content[:at] + struct.pack(">HH", 8_200, 8_200) + content[at + 4 :]
    with little_memory(200), pytest.raises(DataError, match="would take more than 256 MiB"):
        decode(Sample("x", content, 0), RGB_SPEC, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way of Linux")
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_whose_names_are_the_bomb(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("long")
    header.type, header.size = kind, 120 << 20
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(120):
            file.write(bytes(1 << 20))
    with little_memory(60), pytest.raises(DataError, match="a name in it has more than 1,048,576 bytes"):
        read_own(tmp_path / "bomb.tar.gz", AS_IT_IS)


@pytest.mark.parametrize(("key", "value"), [("{}", "x" * 100_000), ("{}" + "x" * 100_000, "")])
def test_a_tar_that_says_much_of_all_its_members_is_refused(tmp_path: Path, key: str, value: str) -> None:
    """Each a little, and all of it kept."""
    with tarfile.open(tmp_path / "much.tar", "w") as file:
        for number in range(20):
            said = tarfile.TarInfo("said").create_pax_global_header({key.format(number): value})
            assert file.fileobj is not None
            file.fileobj.write(said)
        file.addfile(tarfile.TarInfo("a/a.png"))
    with pytest.raises(DataError, match="what it says of all its members has more than 1,048,576 bytes"):
        read_own(tmp_path / "much.tar", AS_IT_IS)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's tar has this option")
def test_a_tar_of_files_with_holes_is_refused(tmp_path: Path) -> None:
    """What it says of its holes could be the bomb."""
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(1 << 20)
    command = ["tar", "--sparse", "--format=gnu", "-C", str(tmp_path), "-cf", str(tmp_path / "holes.tar"), "hole.png"]
    subprocess.run(command, check=True)
    with pytest.raises(DataError, match="pack it without --sparse"):
        read_own(tmp_path / "holes.tar", AS_IT_IS)


@pytest.mark.parametrize(
    "between",
    [
        ("zz", tarfile.DIRTYPE),
        ("zz", tarfile.REGTYPE),
        ("__zz.x__", tarfile.REGTYPE),
        ("__m__/x.y", tarfile.REGTYPE),
    ],
)
def test_what_lies_between_the_files_of_a_sample_does_not_hide_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: tuple[str, bytes]
) -> None:
    monkeypatch.setattr(tables, "LIMITS", replace(tables.LIMITS, file_bytes=1 << 20))
    with tarfile.open(tmp_path / "000.tar", "w") as file:
        for number in range(4):
            part, other = tarfile.TarInfo(f"a.{number}.bin"), tarfile.TarInfo(between[0])
            part.size, other.type = 400_000, between[1]
            file.addfile(part, io.BytesIO(bytes(400_000)))
            file.addfile(other)
    with pytest.raises(DataError, match="holds more than"):
        tables.read_webdataset([tmp_path / "000.tar"], "x", AS_IT_IS)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited the way of Linux")
@pytest.mark.parametrize("planes", ['<TiffData IFD="0" PlaneCount="60000000"/>', "<TiffData/>"])
def test_what_a_tiff_s_words_say_of_its_size_is_not_believed(planes: str) -> None:
    modulo = (
        '<StructuredAnnotations><XMLAnnotation ID="a" Namespace="openmicroscopy.org/omero/dimension/modulo"><Value><Modulo>'
        '<ModuloAlongT Type="lifetime" Start="0" End="200000000"/></Modulo></Value></XMLAnnotation></StructuredAnnotations>'
    )
    words = (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{modulo if planes == "<TiffData/>" else ""}'
        '<Image ID="Image:0"><Pixels DimensionOrder="XYCZT" SizeX="8" SizeY="8" SizeC="1" SizeZ="1" SizeT="1" Type="uint8">'
        f'<Channel SamplesPerPixel="1"/>{planes}</Pixels></Image></OME>'
    )
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((8, 8), np.uint8), description=words, metadata=None, photometric="minisblack")
    with little_memory(200):
        assert codecs.decode(file.getvalue(), "x").array.shape == (8, 8, 1)


@pytest.mark.parametrize("said", ["honest", "a lie"])
def test_a_value_that_many_rows_of_a_table_share_is_read_a_few_times_at_once(tmp_path: Path, said: str) -> None:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    size, rows, path = 4 << 20, 128, tmp_path / "shared.parquet"
    places = pyarrow.array([0] * rows, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(places, pyarrow.array([bytes(size)], pyarrow.binary()))
    parquet.write_table(pyarrow.table({"image": column}), path, compression="zstd", dictionary_pagesize_limit=2 * size)
    if said == "a lie":  # a number of seven bits a byte, in whose place stands as long a one that means 1
        number, declared = b"", 2 * parquet.ParquetFile(path).metadata.row_group(0).total_byte_size
        while declared > 127:
            number, declared = number + bytes([declared & 127 | 128]), declared >> 7
        number += bytes([declared])
        data = path.read_bytes()
        path.write_bytes(data.replace(number, b"\x82" + b"\x80" * (len(number) - 2) + b"\0"))
        assert parquet.ParquetFile(path).metadata.row_group(0).total_byte_size == 1
    largest: list[int] = []
    reader = parquet.ParquetFile.iter_batches

    def seen(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in reader(*arguments, **options):
            largest.append(batch.nbytes)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "iter_batches", seen)
        patch.setattr(tables, "LIMITS", replace(tables.LIMITS, total_bytes=100 << 20))
        with pytest.raises(DataError, match="holds more than"):
            tables.read_parquet(path, AS_IT_IS)
    assert max(largest) < 5 * size


class Endless(BaseHTTPRequestHandler):
    """Sends without an end, packed if it may."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not the place."""


class Trickling(Endless):
    """Sends a byte now and then, for ever."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)


def test_a_download_that_trickles_is_given_up_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_SECONDS", 0.5)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trickling)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(DataError, match="did not come within"):
            download_eurosat(tmp_path, [Mirror(f"http://127.0.0.1:{server.server_port}/x", "x.zip", "0" * 32)])
        with pytest.raises(DataError, match="did not come within"):
            download.download(f"http://127.0.0.1:{server.server_port}/x", 1000)
    finally:
        server.shutdown()
        server.server_close()
    assert (tmp_path / "x.zip.part").stat().st_size > 0


def test_a_download_without_end_is_given_up_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_ARCHIVE_BYTES", 3 << 20)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(DataError, match="more than 3,145,728 bytes came"):
            download_eurosat(tmp_path, [Mirror(f"http://127.0.0.1:{server.server_port}/x", "x.zip", "0" * 32)])
        with pytest.raises(DataError, match="more than 100 bytes came"):
            download.download(f"http://127.0.0.1:{server.server_port}/x", 100)
    finally:
        server.shutdown()
        server.server_close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


class Leading(Endless):
    """Leads elsewhere, with a body that does not end and a cookie that is asked for there; or in a circle; or out of the web."""

    def do_GET(self) -> None:
        to = {"/endless": "/there", "/circle": "/circle", "/file": "file:///etc/passwd"}.get(self.path)
        if to is None:
            self.send_response(200 if "met=yes" in self.headers.get("Cookie", "") else 403)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"all")
            return
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("Set-Cookie", "met=yes")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while self.path == "/endless":
                self.wfile.write(bytes(1 << 16))


def test_where_an_address_leads_is_looked_at_and_what_it_says_beside_is_not_read() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Leading)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        at = f"http://127.0.0.1:{server.server_port}"
        assert download.download(f"{at}/endless", 1000) == b"all"
        with pytest.raises(DataError, match="from one address to another, 5 times"):
            download.download(f"{at}/circle", 1000)
        with pytest.raises(DataError, match="leads to file:///etc/passwd"):
            download.download(f"{at}/file", 1000)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(DataError, match="not as safe"):
        transfer._next("https://safe.example/x", "http://safe.example/x")


DEEP = b"[" * 200_000 + b"]" * 200_000


def test_deeply_nested_json_is_damage_and_not_the_end() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    with pytest.raises(ValueError, match="nested too deeply"):
        unseal(CheckpointState, DEEP)


def test_a_checkpoint_with_a_hostile_state_is_passed_over(ingested: Ingested, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("checkpoints/run/000000008/state.json", DEEP)
    store.write("checkpoints/run/not a step/state.json", b"{}")
    assert load_latest(store, "run") is None


def test_objects_of_a_store_are_files() -> None:
    for name in ("zero", "full"):
        with pytest.raises(StoreError, match="not a file with content"):
            FolderStore(Path("/dev")).read(name)


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(MAX_FILE_BYTES + 1))
    from diffusion.trust.reading import read_file

    assert len(read_file(tmp_path / "big", MAX_FILE_BYTES + 1)) == MAX_FILE_BYTES + 1
    with pytest.raises(DataError, match="has more than"):
        read_file(tmp_path / "big", MAX_FILE_BYTES)


def test_yaml_that_names_its_own_parts_again_and_again_stays_small() -> None:
    bomb = "&a [1,1,1,1,1,1,1,1]"
    for letter in "bcdefghijk":
        before = chr(ord(letter) - 1)
        bomb = f"[{bomb}, &{letter} [{', '.join([f'*{before}'] * 8)}]]" if letter != "b" else f"[{bomb}, &b [*a,*a,*a]]"
    code = f"""
from diffusion.recipe_files import load_recipe
from diffusion.errors import RecipeError
try:
    load_recipe("demo", {{"data.images": {bomb!r}}})
except RecipeError as error:
    assert len(str(error)) < 2000, len(str(error))
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr[-1000:]
