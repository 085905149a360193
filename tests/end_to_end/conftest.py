"""The servers of `make up`, with a model trained on them, for the tests of what users type and see."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from tests.conftest import TINY
from tests.stack import Project, running_project


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Project]:
    with running_project(tmp_path_factory.mktemp("stack"), archive) as project:
        yield project


WEBHOOK = """
import os
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from flows.mail import SmtpMail
data = {"subject": "{{subject}}", "body": "{{body}}"}
CustomWebhookNotificationBlock(name="tests", url=os.environ["RECEIVER"], json_data=data).save("tests")
mail = {"sender": "nightly@example.org", "recipients": ["owner@example.org"], "encryption": "none"}
SmtpMail(host="127.0.0.1", port=int(os.environ["MAIL_PORT"]), **mail).save("tests")
"""


@pytest.fixture(scope="session")
def mails() -> Iterator[tuple[int, list[str]]]:
    """A mail server here: its port, and the mails that it is given."""
    taken: list[str] = []

    class MailServer(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                command = line[:4].upper().strip()
                if command == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    taken.append(b"".join(lines).decode())
                self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 fine\r\n")

    server = ThreadingTCPServer(("127.0.0.1", 0), MailServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], taken
    server.shutdown()


@pytest.fixture(scope="session")
def received(project: Project, mails: tuple[int, list[str]]) -> Iterator[list[dict[str, str]]]:
    """What a receiver of notifications here is told."""
    told: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = project.servers | {"RECEIVER": f"http://127.0.0.1:{server.server_port}/"}
    env |= {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/tests,smtp-mail/tests", "MAIL_PORT": str(mails[0])}
    made = project.shell(sys.executable, "-c", WEBHOOK, env=env)
    assert made.returncode == 0, made.stderr
    refused = project.shell(
        sys.executable, "infra/automations.py", env=env | {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/nobody"}
    )
    assert "names the block 'custom-webhook/nobody', which Prefect does not have" in refused.stderr
    installed = project.shell(sys.executable, "infra/automations.py", env=env)
    assert installed.returncode == 0, installed.stderr
    yield told
    server.shutdown()


@pytest.fixture(scope="session")
def trained(project: Project, received: list[dict[str, str]]) -> str:
    """A model, trained by the literal command of the README; what it printed. Whoever wants to hear of it, listens."""
    parameters = ["-p", "preset=demo", "-p", "source=generated", "--param", f"overrides={json.dumps(TINY)}"]
    done = project.shell("prefect", "deployment", "run", "train-diffusion", *parameters, "--tag", "by-hand", "--watch")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
