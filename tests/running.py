"""One stack for all tests of what users type, see and must not see: its folder was left open by an earlier version, and a
model is trained on it by the README's command while all its processes are looked at.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import PATIENCE, TINY
from tests.processes import family, listens_at
from tests.stack import Project, running_project

STORE_KEY = "store-key-of-the-tests"
PROXY = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
"""Nobody listens there."""
OLD_KEY = "cfTRZvYHTh8PB0nzlQMgBkPYVVRPMkYzCPS8nTPMLHw="


@pytest.fixture(scope="package")
def stack(archive: Path) -> Iterator[Project]:
    """The servers of `make up`, in a folder that others could read before, with a store's key in the environment, on a machine
    whose way out is a proxy: nothing of what runs here may ask that."""
    # pytest's own folders are closed: here only what the project does is to count.
    parent = Path(tempfile.mkdtemp(prefix="train-diffusion-open-"))
    parent.chmod(0o755)
    try:
        make_old_database(parent / "project" / "var")
        with running_project(parent, archive, AWS_SECRET_ACCESS_KEY=STORE_KEY, **PROXY) as project:
            yield project
    finally:
        shutil.rmtree(parent)


def make_old_database(home: Path) -> None:
    """Prefect's database as earlier versions left it, with its key inside, and readable by all."""
    folder = home / "prefect"
    folder.mkdir(parents=True, mode=0o755)
    with sqlite3.connect(folder / "old.db") as database:
        database.execute("CREATE TABLE configuration (key VARCHAR, value JSON)")
        database.execute(
            "INSERT INTO configuration VALUES ('ENCRYPTION_KEY', ?)", [json.dumps({"fernet_key": OLD_KEY})]
        )
    database.close()
    (folder / "old.db").chmod(0o644)
    home.chmod(0o755)


@pytest.fixture(scope="package")
def password(stack: Project) -> str:
    """What the servers ask for."""
    return stack.servers["MLFLOW_TRACKING_PASSWORD"]


WEBHOOK = """
import os
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from flows.plugins.mail import SmtpMail
data = {"subject": "{{subject}}", "body": "{{body}}"}
CustomWebhookNotificationBlock(name="tests", url=os.environ["RECEIVER"], json_data=data).save("tests")
mail = {"sender": "nightly@example.org", "recipients": ["owner@example.org"], "encryption": "none"}
SmtpMail(host="127.0.0.1", port=int(os.environ["MAIL_PORT"]), **mail).save("tests")
"""


@pytest.fixture(scope="package")
def mails() -> Iterator[tuple[int, list[str]]]:
    """A mail server here: its port, and the mails that it is given, as they are read."""
    taken: list[str] = []

    class MailServer(StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 here\r\n")
            for line in self.rfile:
                command = line[:4].upper().strip()
                if command == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    sent = b"".join(line.removeprefix(b".") for line in lines)  # a dot that begins a line is sent twice
                    mail = message_from_bytes(sent, policy=policy.default)
                    headers = "".join(f"{name}: {value}\n" for name, value in mail.items())
                    taken.append(headers + mail.get_content())  # as a reader sees it
                self.wfile.write(b"221 bye\r\n" if command == b"QUIT" else b"250 fine\r\n")

    server = ThreadingTCPServer(("127.0.0.1", 0), MailServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], taken
    server.shutdown()


@pytest.fixture(scope="package")
def received(stack: Project, mails: tuple[int, list[str]]) -> Iterator[list[dict[str, str]]]:
    """What a receiver of notifications here is told."""
    told: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = stack.servers | {"RECEIVER": f"http://127.0.0.1:{server.server_port}/"}
    env |= {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/tests,smtp-mail/tests", "MAIL_PORT": str(mails[0])}
    made = stack.shell(sys.executable, "-c", WEBHOOK, env=env)
    assert made.returncode == 0, made.stderr
    refused = stack.shell(
        sys.executable, "infra/automations.py", env=env | {"TRAIN_DIFFUSION_NOTIFY": "custom-webhook/nobody"}
    )
    assert "names the block 'custom-webhook/nobody', which Prefect does not have" in refused.stdout
    installed = stack.shell(sys.executable, "infra/automations.py", env=env)
    assert installed.returncode == 0, installed.stderr
    yield told
    server.shutdown()


def wait_for_message(received: list[dict[str, str]], text: str, since: int = 0) -> dict[str, str]:
    deadline = time.monotonic() + PATIENCE
    while not (found := [one for one in received[since:] if text in one["subject"] + one["body"]]):
        assert time.monotonic() < deadline, received
        time.sleep(0.2)
    # Prefect delivers an event at least once: under load it was seen to tell the same thing twice.
    assert all(one == found[0] for one in found), found
    return found[0]


@dataclass
class Seen:
    """What was to be seen of a process while everything ran."""

    name: str
    arguments: str
    environment: dict[str, str]
    listens: set[str] = field(default_factory=set)


@dataclass
class Training:
    """A training by the literal command of the README."""

    printed: str
    seen: dict[int, Seen]
    """All processes of the stack, of the command, and of the ranks, over the time of the training."""


@pytest.fixture(scope="package")
def training(stack: Project, received: list[dict[str, str]]) -> Training:
    """Whoever wants to hear of it, listens."""
    command = ["prefect", "deployment", "run", "train-diffusion", "-p", "preset=demo", "-p", "source=generated"]
    command += [
        "--param",
        f"overrides={json.dumps(TINY)}",
        "-p",
        "processes=2",
        "-p",
        "fid_bar=1000",
        "--tag",
        "by-hand",
        "--watch",
    ]
    typed = subprocess.Popen(command, cwd=stack.folder, env=stack.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found: dict[int, Seen] = {}
    while typed.poll() is None:
        for root in (*stack_processes(stack), psutil.Process(typed.pid)):
            for process in family(root):
                look_at(process, found)
        time.sleep(0.8)
    assert typed.stdout is not None
    printed = typed.stdout.read().decode()
    assert typed.returncode == 0, printed[-3000:]
    return Training(printed, found)


SCRIPT = """'"><img src=x onerror="alert(1)">"""
"""A name that is a script where a page shows it as it is."""


@pytest.fixture(scope="package")
def own_images(stack: Project) -> str:
    """What the README's command for images of one's own prints, with a smaller recipe. The classes have names that are scripts."""
    readme = Path(__file__).parents[1] / "README.md"
    (command,) = [line for line in readme.read_text().splitlines() if "source=$HOME" in line]
    rng = np.random.default_rng(0)
    for name in (SCRIPT, "<script>alert(2)<!-- "):
        images = Path(stack.env["HOME"]) / "my-images" / name
        images.mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(images / f"{number}.png")
    overrides = json.dumps({**TINY, "evaluation.every_images": TINY["data.images"]})
    done = stack.shell("sh", "-c", f"{command} -p processes=1 --param '{overrides=!s}'")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def stack_processes(stack: Project) -> list[psutil.Process]:
    """What `make up` started."""
    pids = [int(path.read_text().split()[0]) for path in (stack.folder / "var/stack").glob("*.pid")]
    return [psutil.Process(pid) for pid in pids]


def look_at(process: psutil.Process, found: dict[int, Seen]) -> None:
    try:
        arguments, environment = " ".join(process.cmdline()), process.environ()
        listens = {address for address, _ in listens_at(process)}
        name = process.name()
    except psutil.Error:
        return
    if not arguments:
        return
    one = found.setdefault(process.pid, Seen(name, arguments, environment))
    one.listens |= listens
    # A process that has just been forked shows its parent's words: the last that were seen count as well.
    one.arguments, one.environment = f"{one.arguments}\n{arguments}", environment
