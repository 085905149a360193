"""WebDataset tars of a real S3 server and a real web server are the dataset that they are on the disk."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from diffusion.data.ingest import ingest
from diffusion.data.sources.find import find_archive, read_source
from diffusion.data.sources.source import Source
from diffusion.data.sources.tables import WEBDATASET
from diffusion.errors import DataError, StoreError
from diffusion.settings import Settings, settings
from diffusion.store.objects import FolderStore

BRACES = "{000..001}.tar"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder with two tars, of 30 images of three bands and their classes in JSON."""
    rng, folder = np.random.default_rng(0), tmp_path / "here"
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"lakes-{part:03d}.tar", "w") as file:
            for number in range(15):
                image = io.BytesIO()
                np.save(image, rng.integers(0, 5000, (16, 16, 3), np.uint16))
                label = b'{"label": "%s"}' % (b"deep", b"flat")[number % 2]
                for extension, content in (("npy", image.getvalue()), ("json", label)):
                    header = tarfile.TarInfo(f"{part}-{number}.{extension}")
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Settings:
    return settings().model_copy(update={"home": tmp_path / "home"})


def read(source: str, environment: Settings) -> Source:
    return read_source(source, find_archive(source, environment))


class Handler(BaseHTTPRequestHandler):
    """Serves the tars with ETags and ranges; is busy once, and breaks every transfer of the second one off."""

    folder: Path
    sent: list[str]
    busy = False
    ranges = True

    def do_GET(self) -> None:
        cls = type(self)
        path = self.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        etag = f'"{len(body)}-{body[:600].count(0)}"'
        if self.headers.get("If-None-Match") == etag:
            self.send_response(304)
            self.end_headers()
            return
        if not cls.busy:
            cls.busy = True
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.end_headers()
            return
        start = 0
        if cls.ranges and self.headers.get("If-Range") == etag:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", etag)
        self.end_headers()
        cls.sent.append(f"{self.path} from {start}")
        if self.path.endswith("001.tar"):
            body = body[: start + 8192]
            self.close_connection = True
        self.wfile.write(body[start:])

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not the place."""


@pytest.fixture
def web(tars: Path) -> Iterator[tuple[str, type[Handler]]]:
    """The tars' address, and how they are served."""
    handler = type("OwnHandler", (Handler,), {"folder": tars, "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/lakes-{BRACES}", handler
    server.shutdown()


def test_on_the_web_they_are_fetched_once(
    tars: Path, web: tuple[str, type[Handler]], here: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, handler = web
    sent = handler.sent
    expected = read(f"{WEBDATASET}{tars}/lakes-{BRACES}", here)
    monkeypatch.setattr("diffusion.data.sources.transfer.time.sleep", lambda seconds: None)
    handler.ranges = False
    with pytest.raises(
        StoreError, match=r"8,?192 of|IncompleteRead|broken"
    ):  # worth another try, unlike what is missing
        find_archive(source, here)
    assert sent == ["/lakes-000.tar from 0", *["/lakes-001.tar from 0"] * 4], "three brought nothing new"
    sent.clear()
    handler.ranges = True
    found = read(source, here)
    assert (found.digest, found.name, found.classes) == (expected.digest, "lakes", ("deep", "flat"))
    size = (tars / "lakes-001.tar").stat().st_size
    assert sent == [f"/lakes-001.tar from {start}" for start in range(0, size, 8192)], "each brings it further"
    manifest = ingest(found, FolderStore(tmp_path / "store"))
    assert (manifest.images.dtype, sum(manifest.splits.values())) == ("uint16", 30)
    # What changes there is fetched again.
    (tars / "lakes-000.tar").write_bytes((tars / "lakes-001.tar").read_bytes() + bytes(512))
    with pytest.raises(DataError, match="two images deep/1-0"):
        read(source, here)
    assert sent[-1] == "/lakes-000.tar from 0"
    with pytest.raises(DataError, match=r"lakes-007.tar is not to be had: there is none"):
        find_archive(source.replace(BRACES, "007.tar"), here)


class Chunked(Handler):
    """Sends a tar in one chunk, and breaks off before it says that this was the last."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.close_connection = True
        body = (self.folder / self.path.strip("/")).read_bytes()
        if "Range" in self.headers:
            assert self.headers["Range"] == f"bytes={len(body)}-"
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("ETag", '"one"')
        self.end_headers()
        self.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")


def test_one_that_broke_off_behind_its_last_byte_is_whole_and_one_that_is_too_large_is_not_kept(
    tars: Path, here: Settings
) -> None:
    handler = type("OwnHandler", (Chunked,), {"folder": tars, "sent": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = f"http://127.0.0.1:{server.server_port}/lakes-{BRACES}"
    with pytest.MonkeyPatch.context() as small:
        small.setattr("diffusion.data.sources.remote.TAR_BYTES", 1000)
        with pytest.raises(DataError, match="cut it into more tars"):
            find_archive(source, here)
    assert [path.name for path in (here.downloads / "tars").iterdir()] == [".lock"]
    assert read(source, here).digest == read(f"{WEBDATASET}{tars}/lakes-{BRACES}", here).digest
    server.shutdown()
    server.server_close()


def test_on_s3_they_need_a_permission(
    tars: Path, s3: dict[str, str], here: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3")
    for tar in tars.iterdir():
        client.upload_file(str(tar), "tests", f"images/{tar.name}")
    source = f"s3://tests/images/lakes-{BRACES}"
    assert read(source, here).digest == read(f"{WEBDATASET}{tars}/lakes-{BRACES}", here).digest
    copies = {path: path.stat().st_mtime_ns for path in (here.downloads / "tars").iterdir()}
    read(source, here)
    assert copies == {path: path.stat().st_mtime_ns for path in (here.downloads / "tars").iterdir()}
    with pytest.raises(DataError, match=r"lakes-007.tar is not to be had: there is none"):
        find_archive(source.replace(BRACES, "007.tar"), here)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(DataError, match=r"you may not read it.*AWS_ACCESS_KEY_ID"):
        find_archive(source, here)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("https://me:secret@host/a.tar", "user or password"),
        ("ftp://host/a.tar", "read from this machine, s3:// and https://"),
        ("s3://bucket/{0..999999999}.tar", "more than 100,000 tars"),
        (f"s3://bucket/{'{a..z}' * 9}.tar", "more than 100,000 tars"),
        (f"s3://bucket/{'{a,b}' * 60}.tar", "more than 100,000 tars"),
        ("s3://bucket/{0..9", "no pattern"),
        (f"{WEBDATASET}/a.tar,https://pipe:touch /tmp/x", "tars are read from this machine"),
    ],
)
def test_addresses_are_looked_at_first(source: str, said: str, here: Settings) -> None:
    with pytest.raises(DataError, match=said) as raised:
        find_archive(source, here)
    assert "secret" not in str(raised.value)
