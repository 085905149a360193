"""What another user of this machine can do: tried as that user, which needs root, who can become one; or by listening on a port."""

from __future__ import annotations

import encodings.idna  # noqa: F401  sockets want it, and another user may not read it where Python lies
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can try it as another user")


def as_another_user(function: Callable[[], Any]) -> Any:
    """Call the function in a process of another user, without any group of ours, and return its result (of JSON's kinds)."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with os.fdopen(into, "w") as file:
                json.dump(function(), file)
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the other user's process failed"
    return json.loads(said)


@contextmanager
def listening(port: str) -> Iterator[list[str]]:
    """Whoever takes a port of this machine that is free, and what they are told there."""
    told: list[str] = []
    server = socket.create_server(("127.0.0.1", int(port)))

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.settimeout(600)
            told.append(connection.recv(65536).decode(errors="replace"))
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield told
    server.close()
