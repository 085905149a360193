"""A stack whose folder was left open by an earlier version, and a training on it, looked at while it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import TINY
from tests.stack import Project, running_project

STORE_KEY = "store-key-of-the-tests"
OVERRIDES = TINY | {"evaluation.every_images": 256}
OLD_KEY = "cfTRZvYHTh8PB0nzlQMgBkPYVVRPMkYzCPS8nTPMLHw="


@dataclass
class Seen:
    """What was to be seen of a process while everything ran."""

    name: str
    arguments: str
    environment: dict[str, str]
    listens: set[str] = field(default_factory=set)


def make_old_database(home: Path) -> None:
    """Prefect's database as earlier versions left it, with its key inside, and readable by all."""
    import sqlite3

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


@pytest.fixture(scope="session")
def stack(archive: Path) -> Iterator[Project]:
    """The servers of `make up`, in a folder that others could read before, with a store's key in the environment."""
    # pytest's own folders are closed: here only what the project does is to count.
    parent = Path(tempfile.mkdtemp(prefix="train-diffusion-open-"))
    parent.chmod(0o755)
    try:
        make_old_database(parent / "project" / "var")
        with running_project(parent, archive, AWS_SECRET_ACCESS_KEY=STORE_KEY) as project:
            yield project
    finally:
        shutil.rmtree(parent)


@pytest.fixture(scope="session")
def password(stack: Project) -> str:
    return stack.servers["MLFLOW_TRACKING_PASSWORD"]


def roots(stack: Project) -> list[psutil.Process]:
    pids = [int(path.read_text().split()[0]) for path in (stack.folder / "var/stack").glob("*.pid")]
    return [psutil.Process(pid) for pid in pids]


@pytest.fixture(scope="session")
def seen(stack: Project) -> dict[int, Seen]:
    """All processes of the stack, of the command that starts a training, and of its ranks, over the time of a training."""
    command = ["prefect", "deployment", "run", "train-diffusion", "-p", "preset=demo", "-p", "source=generated"]
    command += ["-p", "processes=1", "--param", f"overrides={json.dumps(OVERRIDES)}", "--watch"]
    typed = subprocess.Popen(command, cwd=stack.folder, env=stack.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found: dict[int, Seen] = {}
    while typed.poll() is None:
        for root in (*roots(stack), psutil.Process(typed.pid)):
            for process in (root, *root.children(recursive=True)):
                look_at(process, found)
        time.sleep(0.4)
    assert typed.stdout is not None
    output = typed.stdout.read().decode()
    assert typed.returncode == 0, output[-3000:]
    (stack.folder.parent / "typed.txt").write_text(output)
    return found


def look_at(process: psutil.Process, found: dict[int, Seen]) -> None:
    try:
        arguments, environment = " ".join(process.cmdline()), process.environ()
        listens = {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        name = process.name()
    except psutil.Error:
        return
    if not arguments:
        return
    one = found.setdefault(process.pid, Seen(name, arguments, environment))
    one.listens |= listens
    # A process that has just been forked shows its parent's words: the last that were seen count as well.
    one.arguments, one.environment = f"{one.arguments}\n{arguments}", environment
