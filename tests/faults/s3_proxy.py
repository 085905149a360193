"""A proxy in front of an S3 server that behaves as bad days do: 503s, slow bytes, cut connections, listings that lag."""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


@dataclass
class Faults:
    """What goes wrong, and how often (shares of the requests); `seen` counts what did."""

    unavailable: float = 0.0
    cut: float = 0.0
    slow: float = 0.0
    lost_answer: float = 0.0
    """Writes that the server takes, but whose answer never arrives."""
    listing_lag: float = 0.0
    """Seconds by which listings are old."""
    expired: bool = False
    """The session is over."""
    on_put: Callable[[str], None] | None = None
    """Called with the path when half of a written object has arrived."""
    seed: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()
        self._listings: dict[str, list[tuple[float, int, bytes]]] = {}

    def happens(self, what: str) -> bool:
        with self._lock:
            yes = self._random.random() < getattr(self, what)
            self.seen[what] = self.seen.get(what, 0) + yes
            return yes

    def lagging(self, path: str, status: int, body: bytes) -> tuple[int, bytes]:
        """What the listing was `listing_lag` seconds ago, or the first one that was ever seen."""
        with self._lock:
            known = self._listings.setdefault(path, [])
            now = time.monotonic()
            known.append((now, status, body))
            old = [entry for entry in known if entry[0] <= now - self.listing_lag] or known[:1]
            if old[-1][2] != body:
                self.seen["listing_lag"] = self.seen.get("listing_lag", 0) + 1
            return old[-1][1], old[-1][2]


@contextmanager
def proxy(upstream: str, faults: Faults, address: str = "127.0.0.1") -> Iterator[str]:
    """Run the proxy; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if self.headers.get("Expect") == "100-continue":
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(length // 2)
            if self.command == "PUT" and faults.on_put is not None:
                faults.on_put(self.path)
            body += self.rfile.read(length - length // 2)
            if faults.expired:
                return self._answer(400, {"Content-Type": "application/xml"}, EXPIRED)
            if faults.happens("unavailable"):
                return self._answer(503, {}, b"")
            if faults.happens("slow"):
                time.sleep(0.2)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP | {"expect"}}
            connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=60)
            try:
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                content, status = response.read(), response.status
            except OSError:
                return self._answer(503, {}, b"")
            finally:
                connection.close()
            if self.command in ("PUT", "POST") and faults.happens("lost_answer"):
                return self._hang_up()
            if self.command == "GET" and "list-type=2" in self.path and faults.listing_lag:
                status, content = faults.lagging(self.path, status, content)
            kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP | {"content-length"}}
            if self.command == "HEAD":
                kept["Content-Length"] = response.getheader("Content-Length") or "0"
            if self.command == "GET" and len(content) > 1 and faults.happens("cut"):
                self._answer(status, kept, content, cut=True)
                return self._hang_up()
            return self._answer(status, kept, content)

        def _answer(self, status: int, headers: dict[str, str], content: bytes, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if cut else content)
            self.wfile.flush()

        def _hang_up(self) -> None:
            self.close_connection = True
            self.connection.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that was killed breaks off its connection: that is the point."""

    server = Server((address, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{address}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
