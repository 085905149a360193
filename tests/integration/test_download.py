"""The download against a real HTTP server that breaks off, has no ranges, or serves the wrong file."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffusion.data.sources.download import download_eurosat
from diffusion.data.sources.eurosat import Mirror
from diffusion.errors import DataError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/whole, /breaks (cuts the first transfer after 2 MB), /noranges, /missing."""

    requests: list[str]
    broken: bool

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.requests.append(f"{self.path} {wanted or ''}".strip())
        if self.path == "/missing":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/noranges" else 0
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/breaks" and not cls.broken:
            cls.broken = True
            self.wfile.write(body[:2_000_000])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not the place."""


@pytest.fixture
def serve() -> Iterator[tuple[Callable[..., Mirror], list[str]]]:
    """Makes mirrors on a local server, and lists the requests that came."""
    handler = type("OwnHandler", (Handler,), {"requests": [], "broken": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def mirror(path: str, md5: str = MD5) -> Mirror:
        return Mirror(f"http://127.0.0.1:{server.server_port}{path}", f"{path.strip('/')}.zip", md5)

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
    assert [p.name for p in tmp_path.iterdir()] == ["breaks.zip"]


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
    for part in ("404", "md5", "no connection", "EUROSAT_ARCHIVE"):
        assert part in str(error.value)
    assert not (tmp_path / "noranges.zip").exists()
