"""`make audit` asks a database about every package, and is content only if it knows each of them and none is vulnerable.

The database is one of ours: it stands where the package index's would, behind a proxy and a certificate that the test vouches for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.certificates import certificate, server_side
from tests.stack import copy_project

INDEX = "pypi.org"
FLAW = {"id": "TEST-2026-1", "aliases": ["CVE-2026-0001"], "fixed_in": ["999.0"], "details": "It lets anybody in."}


class Database(BaseHTTPRequestHandler):
    """The proxy on the way to the index, and the index. It knows every package but `unknown`; of `flawed` it knows a flaw."""

    address: str
    pem: Path
    asked: set[tuple[str, str]]
    unknown = flawed = ""

    def do_CONNECT(self) -> None:
        assert self.path == f"{INDEX}:443", self.path
        self.send_response(200)
        self.end_headers()
        self.connection = server_side(self.pem).wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.close_connection = False

    def do_GET(self) -> None:
        found = re.fullmatch(r"/pypi/([^/]+)/([^/]+)/json", self.path)
        assert found, self.path
        self.asked.add((found[1], found[2]))
        flaws = [FLAW] if found[1] == self.flawed else []
        content = json.dumps({"info": {"name": found[1]}, "vulnerabilities": flaws}).encode()
        self.send_response(404 if found[1] == self.unknown else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[type[Database]]:
    class Own(Database):
        pem, asked, protocol_version = certificate(tmp_path, INDEX), set(), "HTTP/1.1"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Own
    server.shutdown()


def test_an_audit_asks_about_every_package_and_fails_for_one_that_is_vulnerable_or_unknown(
    tmp_path: Path, database: type[Database], archive: Path
) -> None:
    project = tmp_path / "project"
    copy_project(project, archive)
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    env |= {"HTTPS_PROXY": database.address, "REQUESTS_CA_BUNDLE": str(database.pem), "HOME": str(tmp_path)}

    def audit() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "audit"], cwd=project, env=env, capture_output=True, text=True)

    clean = audit()
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert "No known vulnerabilities found" in clean.stderr
    lines = [line for path in project.glob("*.lock") for line in path.read_text().splitlines() if "==" in line]
    # Some are for other systems alone; the build without CUDA has the version of the other.
    needed = {line.split("==")[0] for line in lines if " ; " not in line and "+cpu" not in line}
    asked = {name for name, _ in database.asked}
    assert len(needed) > 200
    assert needed <= asked <= {line.split("==")[0] for line in lines}

    database.flawed = "mlflow"
    vulnerable = audit()
    assert vulnerable.returncode != 0
    assert re.search(r"mlflow\s+\S+\s+CVE-2026-0001\s+999\.0", vulnerable.stdout), vulnerable.stdout

    database.flawed, database.unknown = "", "prefect"
    unknown = audit()
    assert unknown.returncode != 0
    assert "prefect" in unknown.stderr
    assert "No known vulnerabilities found" not in unknown.stderr
