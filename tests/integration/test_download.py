"""The download against a real HTTP server that breaks off, has no ranges, or serves the wrong file."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffusion.data.sources import download, transfer
from diffusion.data.sources.download import download_eurosat
from diffusion.data.sources.eurosat import Mirror
from diffusion.errors import DataError, StoreError
from diffusion.features.inception import Web
from diffusion.store.copies import LocalCopy
from tests.certificates import certificate, server_side

CONTENT = bytes(range(256)) * 20_000  # 5 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/whole, /breaks (cuts the first transfer after 2 MB), /pieces (cuts each after 1 MB), /noranges, /busy (at first), /missing."""

    requests: list[str]
    broken: bool
    answers: list[tuple[int, str | None]]
    """Of /busy, before it serves: status and Retry-After."""

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.requests.append(f"{self.path} {wanted or ''}".strip())
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/busy" and cls.answers:
            status, later = cls.answers.pop(0)
            self.send_response(status)
            if later is not None:
                self.send_header("Retry-After", later)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/noranges" else 0
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/pieces" or (self.path == "/breaks" and not cls.broken):
            cls.broken = True
            self.wfile.write(body[: 1_000_000 if self.path == "/pieces" else 2_000_000])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not the place."""


@pytest.fixture
def serve() -> Iterator[tuple[Callable[..., Mirror], list[str]]]:
    """Makes mirrors on a local server, and lists the requests that came."""
    handler = type("OwnHandler", (Handler,), {"requests": [], "broken": False, "answers": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def mirror(path: str, md5: str = MD5) -> Mirror:
        return Mirror(f"http://127.0.0.1:{server.server_port}{path}", f"{path.strip('/')}.zip", md5)

    mirror.busy = handler.answers  # type: ignore[attr-defined]
    yield mirror, handler.requests  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


Serve = tuple[Callable[..., Mirror], list[str]]


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    seen: list[tuple[int, int | None]] = []
    path = download_eurosat(tmp_path, [mirror("/breaks")], lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert requests[0] == "/breaks"
    start = int(requests[1].partition("bytes=")[2].rstrip("-"))
    assert 0 < start <= 2_000_000
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["breaks.zip"]


def test_a_later_call_goes_on_as_well(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    (tmp_path / "whole.zip.part").write_bytes(CONTENT[:3_000_000])
    assert download_eurosat(tmp_path, [mirror("/whole")]).read_bytes() == CONTENT
    assert requests == ["/whole bytes=3000000-"]


def test_a_server_without_ranges_starts_again(tmp_path: Path, serve: Serve) -> None:
    mirror, _ = serve
    (tmp_path / "noranges.zip.part").write_bytes(CONTENT[:3_000_000])
    assert download_eurosat(tmp_path, [mirror("/noranges")]).read_bytes() == CONTENT


def test_the_next_mirror_is_taken_and_all_reasons_are_told(tmp_path: Path, serve: Serve) -> None:
    mirror, _ = serve
    wrong = mirror("/noranges", "0" * 32)
    assert download_eurosat(tmp_path, [mirror("/missing"), wrong, mirror("/whole")]).name == "whole.zip"
    nobody = Mirror("http://127.0.0.1:9/x.zip", "x.zip", MD5)
    with pytest.raises(DataError) as error:
        download_eurosat(tmp_path, [mirror("/missing"), wrong, nobody])
    for part in ("404", "md5", "connection refused", "EUROSAT_ARCHIVE"):
        assert part in str(error.value)
    assert not (tmp_path / "noranges.zip").exists()


def test_it_goes_on_as_long_as_it_moves_on(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    assert download_eurosat(tmp_path, [mirror("/pieces")]).read_bytes() == CONTENT
    assert len(requests) == 6, "1 MB each time"


def test_an_extractor_s_network_comes_as_well_through_breaks_and_from_a_busy_server(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "BUSY_SECONDS", 0.1)
    mirror, requests = serve
    assert download.download(mirror("/pieces").url, len(CONTENT)) == CONTENT
    assert len(requests) == 6, "1 MB each time"
    mirror.busy.extend([(503, None), (429, "0")])  # type: ignore[attr-defined]
    assert download.download(mirror("/busy").url, len(CONTENT)) == CONTENT
    mirror.busy.extend([(503, "0")] * transfer.BUSY_TIMES)  # type: ignore[attr-defined]
    with pytest.raises(StoreError, match="HTTP 503, busy"):
        download.download(mirror("/busy").url, len(CONTENT))
    with pytest.raises(StoreError, match="refused"):
        download.download("http://127.0.0.1:9/x", len(CONTENT))
    for never in (mirror("/missing").url, "http://[::1/x"):  # no later try is answered otherwise
        with pytest.raises(DataError, match="can't be downloaded"):
            download.download(never, len(CONTENT))


def test_it_is_fetched_once(tmp_path: Path, serve: Serve) -> None:
    """Every evaluation of a night asks for it: the network may be away then."""
    mirror, requests = serve
    for _ in range(2):
        url, sha256 = mirror("/pieces").url, hashlib.sha256(CONTENT).hexdigest()
        assert LocalCopy(Web(), tmp_path).read(url, sha256) == CONTENT
    assert len(requests) == 6, "1 MB each time"


def test_the_rest_of_another_file_is_noticed_in_the_same_start(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    (tmp_path / "whole.zip.part").write_bytes(b"of another file" * 100_000)
    assert download_eurosat(tmp_path, [mirror("/whole")]).read_bytes() == CONTENT
    assert requests == ["/whole bytes=1500000-", "/whole"]


@pytest.mark.parametrize(
    ("status", "later"), [(429, "1"), (503, None), (503, "Fri, 27 Nov 2026 00:00:00 GMT"), (429, "soon")]
)
def test_a_busy_server_is_waited_for(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, status: int, later: str | None
) -> None:
    monkeypatch.setattr(transfer, "BUSY_SECONDS", 0.5)
    mirror, requests = serve
    mirror.busy.append((status, later))  # type: ignore[attr-defined]
    assert download_eurosat(tmp_path, [mirror("/busy")]).read_bytes() == CONTENT
    assert requests == ["/busy", "/busy"]


def test_while_one_is_busy_the_next_is_asked(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    mirror.busy.append((429, "60"))  # type: ignore[attr-defined]
    assert download_eurosat(tmp_path, [mirror("/busy"), mirror("/whole")]).name == "whole.zip"
    assert requests == ["/busy", "/whole"]


def test_one_that_stays_busy_is_given_up(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    mirror.busy.extend([(429, "0")] * 100)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="HTTP 429, busy"):
        download_eurosat(tmp_path, [mirror("/busy")])
    assert len(requests) == 5


@pytest.mark.parametrize(
    ("said", "seconds"), [(None, 10.0), ("7", 7.0), ("100000", 300.0), ("-1", 10.0), ("nonsense", 10.0), ("1e9", 10.0)]
)
def test_what_a_server_may_ask_for(said: str | None, seconds: float) -> None:
    assert transfer.retry_after(said) == seconds


def test_of_two_at_once_one_downloads_and_the_other_waits(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    with ThreadPoolExecutor() as pool:
        paths = list(pool.map(lambda _: download_eurosat(tmp_path, [mirror("/pieces")]), range(2)))
    assert [path.read_bytes() == CONTENT for path in paths] == [True, True]
    assert len(requests) == 6, "as many as one needs"


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a small disk is mounted as root on Linux")
def test_a_full_disk_is_said_and_no_other_mirror_asked(tmp_path: Path, serve: Serve) -> None:
    mirror, requests = serve
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no disk may be mounted here")
    try:
        with pytest.raises(DataError, match=r"takes no more \(No space left on device\).*what came is kept"):
            download_eurosat(small, [mirror("/whole"), mirror("/noranges")])
        assert requests == ["/whole"]
        assert 0 < (small / "whole.zip.part").stat().st_size < len(CONTENT)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def https_server(folder: Path, name: str, days: int) -> int:
    """The port of a server here with a certificate of its own, for that name, which ends in so many days."""
    handler = type("OwnHandler", (Handler,), {"requests": [], "broken": False, "answers": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.socket = server_side(certificate(folder, name, days)).wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


@pytest.mark.parametrize(
    ("trusted", "name", "days", "said"),
    [
        (False, "127.0.0.1", 30, "of an authority that this machine does not know. Set REQUESTS_CA_BUNDLE"),
        (True, "127.0.0.1", -1, "has expired, or this machine's clock is wrong"),
        (True, "other.example", 30, "is for another name"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool, name: str, days: int, said: str
) -> None:
    port = https_server(tmp_path, name, days)
    if trusted:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / f"{name}.pem"))
    with pytest.raises(DataError, match=said):
        download_eurosat(tmp_path, [Mirror(f"https://127.0.0.1:{port}/whole", "whole.zip", MD5)])


def test_one_s_own_authority_is_named_by_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = https_server(tmp_path, "127.0.0.1", 30)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "127.0.0.1.pem"))
    found = download_eurosat(tmp_path, [Mirror(f"https://127.0.0.1:{port}/whole", "whole.zip", MD5)])
    assert found.read_bytes() == CONTENT


class Guarded(BaseHTTPRequestHandler):
    """A proxy that wants another password."""

    def do_CONNECT(self) -> None:
        self.send_error(407)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("url", "env", "said"),
    [
        ("https://nowhere.invalid/x", {}, "its name is not known here"),
        (
            "https://127.0.0.1:9/x",
            {"REQUESTS_CA_BUNDLE": "/no/such.pem"},
            "REQUESTS_CA_BUNDLE .* is not there .*/no/such.pem",
        ),
        (
            "https://example.org/x",
            {"HTTPS_PROXY": "http://me:secret@127.0.0.1:9"},
            "the proxy 127.0.0.1:9 does not answer",
        ),
        (
            "https://example.org/x",
            {"HTTPS_PROXY": "http://127.0.0.1:SILENT"},
            "by the proxy 127.0.0.1:[0-9]+ .HTTPS_PROXY",
        ),
        ("https://example.org/x", {"ALL_PROXY": "http://127.0.0.1:9"}, "the proxy 127.0.0.1:9 .* Set ALL_PROXY right"),
        (
            "https://example.org/x",
            {"HTTPS_PROXY": "http://me:secret@127.0.0.1:GUARDED"},
            "wants a user and a password .HTTP 407.. HTTPS_PROXY takes both",
        ),
        ("http://127.0.0.1:SILENT/x", {}, "silence for 1 s"),
    ],
)
def test_why_a_server_is_not_reached_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, env: dict[str, str], said: str
) -> None:
    if "SILENT" in url + "".join(env.values()):
        monkeypatch.setattr(transfer, "CONNECT_AND_READ_SECONDS", (1, 1))
    for name in ("NO_PROXY", "no_proxy", *transfer.PROXIES):
        monkeypatch.delenv(name, raising=False)
    guarded = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=guarded.serve_forever, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0)) as silent, guarded:
        port = str(silent.getsockname()[1])
        for name, value in env.items():
            monkeypatch.setenv(name, value.replace("SILENT", port).replace("GUARDED", str(guarded.server_port)))
        with pytest.raises(DataError, match=said) as error:
            download_eurosat(tmp_path, [Mirror(url.replace("SILENT", port), "x.zip", MD5)])
        guarded.shutdown()
    assert "secret" not in str(error.value)
