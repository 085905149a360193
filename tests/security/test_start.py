"""What another user of the machine can do while the servers start: take their port, and so be told the password."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import free_port

PROJECT = Path(__file__).resolve().parents[2]
SERVE = """
import http.server, sys
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
WAIT = """
import sys
sys.path.insert(0, "infra")
import processes
from processes import STACK, base_environment, find, start, stop, wait_until_ready
STACK.mkdir(parents=True, mode=0o700)
processes.READY_SECONDS = 60 if sys.argv[1] == "ours" else 3
code, port = sys.argv[2], sys.argv[3]
start("server", [sys.executable, "-c", code, port], base_environment())
try:
    wait_until_ready("server", f"http://127.0.0.1:{port}", "/")
    print("ready")
finally:
    stop("server")
"""


class Anybody(BaseHTTPRequestHandler):
    """Says yes to everything."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody else answers."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Anybody)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def wait(home: Path, whose: str, code: str, port: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TRAIN_DIFFUSION_HOME": str(home)}
    command = [sys.executable, "-P", "-c", WAIT, whose, code, str(port)]
    return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)


def test_a_server_is_ready_when_it_answers_itself_and_not_when_somebody_else_does(tmp_path: Path, taken: int) -> None:
    waits = wait(tmp_path / "taken", "another's", "import time; time.sleep(60)", taken)
    assert waits.returncode != 0
    assert "server did not become ready" in waits.stderr, waits.stderr
    ours = wait(tmp_path / "free", "ours", SERVE, free_port())
    assert "ready" in ours.stdout, ours.stderr


def test_what_can_t_be_found_again_is_not_left_running(tmp_path: Path) -> None:
    """On a full disk: the process is there before its number can be noted."""
    full = WAIT.replace("start(", "processes.write_private = full\nstart(", 1).replace(
        "code, port", 'def full(*_):\n    raise OSError(28, "No space left on device")\n\n\ncode, port', 1
    )
    mark = f"mark-{tmp_path.name}"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", full, "another's", f"import time; time.sleep(60)  # {mark}", "1"],
        cwd=PROJECT,
        env=os.environ | {"TRAIN_DIFFUSION_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "can't be written (No space left on device): server was not started" in ended.stderr, ended.stderr
    found = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True)
    assert found.stdout == ""
