"""The container stack, started for real: `make containers`. Skipped where no container engine answers.

Builds the image if there is none of this commit. PYTHON_IMAGE, POSTGRES_IMAGE, S3_IMAGE, TORCH_LOCK and PIP_EXTRA_INDEX_URL of the
shell count, as they do for `docker compose`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffusion.training.journal import JOURNAL
from tests.conftest import TINY, free_port
from tests.faults.flow_runs import ENDS, on_generated
from tests.servers import Servers

PROJECT = Path(__file__).resolve().parents[2]
STEPS = 300
OVERRIDES = TINY | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS // 2}
VICTIMS = {"postgres": 40, "s3": 80, "mlflow-server": 120, "prefect-server": 160, "worker": 200}
"""What is killed, and at which step of the training."""
STOPPED = 240
"""Step at which the worker is asked to end."""

DIGEST = f"""
import hashlib, sys
from diffusion.store.objects import open_store
from diffusion.settings import settings
store, where = open_store(settings().store_uri), f"checkpoints/{{sys.argv[1]}}/{STEPS:09d}"
for part in ("model.safetensors", "optimizer.safetensors", "{JOURNAL}"):
    print(part, hashlib.sha256(store.read(f"{{where}}/{{part}}")).hexdigest())
"""
NEWEST = f"""
import json, sys
from diffusion.store.objects import open_store
from diffusion.settings import settings
kept = open_store(settings().store_uri).names(f"checkpoints/{{sys.argv[1]}}/")
written = (settings().runs / sys.argv[1] / "{JOURNAL}").read_text().splitlines()
print(max(int(name.split("/")[2]) for name in kept), json.loads(written[-1])["step"])
"""
AS_A_USER = """
import diffusion, mlflow, sys
(version,) = mlflow.MlflowClient().search_model_versions(f"run_id = '{sys.argv[1]}'")
model = diffusion.load(f"{version.name}/{version.version}")
print(len(model.draw(2)), version.tags["git.commit"])
"""


class Containers:
    """The services of infra/compose.yaml, with names, ports and secrets of their own."""

    def __init__(self, folder: Path) -> None:
        for name in ("make_secrets.py", "example.env"):
            shutil.copy(PROJECT / "infra" / name, folder)
        subprocess.run([sys.executable, folder / "make_secrets.py"], check=True, cwd=PROJECT)
        secrets = (folder / ".env").read_text()
        self.secrets = dict(line.split("=", 1) for line in secrets.splitlines())
        self.ports = {"PREFECT_PORT": free_port(), "MLFLOW_PORT": free_port()}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True)
        self.commit = commit.stdout.strip()
        self.env = os.environ | {name: str(port) for name, port in self.ports.items()} | {"COMMIT": self.commit}
        self.command = ["docker", "compose", "-p", f"td-{uuid.uuid4().hex[:8]}", "--env-file", str(folder / ".env")]
        self.command += ["-f", "infra/compose.yaml"]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments], cwd=PROJECT, env=self.env, capture_output=True, text=True, timeout=3600
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def inside(self, *command: str) -> str:
        """In the worker, as its user."""
        return self.run("exec", "-T", "worker", *command)

    def build(self) -> None:
        """Unless there is an image of this commit."""
        seen = subprocess.run(
            ["docker", "image", "inspect", "train-diffusion", "--format", "{{json .Config.Env}}"],
            capture_output=True,
            text=True,
        )
        if f"TRAIN_DIFFUSION_COMMIT={self.commit}" not in seen.stdout:
            self.run("build", "worker")

    def all(self) -> list[dict[str, Any]]:
        """What `docker inspect` says of each."""
        done = subprocess.run(
            ["docker", "inspect", *self.run("ps", "-aq").split()], capture_output=True, text=True, check=True
        )
        return list(json.loads(done.stdout))

    def of(self, service: str) -> dict[str, Any]:
        (one,) = [c for c in self.all() if c["Config"]["Labels"]["com.docker.compose.service"] == service]
        return one

    def die(self, service: str) -> None:
        """As it would by itself: the engine has not been told, and starts it again."""
        before = self.of(service)["State"]["Pid"]
        os.kill(before, 9)
        wait_for(lambda: (state := self.of(service)["State"])["Running"] and state["Pid"] not in (0, before))

    def ask(self, variable: str, path: str, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[variable]}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @property
    def servers(self) -> Servers:
        prefect, mlflow = (f"http://127.0.0.1:{self.ports[port]}" for port in ("PREFECT_PORT", "MLFLOW_PORT"))
        logins = [("admin", self.secrets[name]) for name in ("PREFECT_PASSWORD", "MLFLOW_PASSWORD")]
        return Servers(f"{prefect}/api", mlflow, *logins)

    def as_admin(self, password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + b64encode(f"admin:{self.secrets[password]}".encode()).decode()}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 900  # patience: a busy machine fails nothing
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


class Training:
    """One flow run of the stack's deployment."""

    def __init__(self, stack: Containers) -> None:
        self.stack = stack
        self.start()

    def start(self) -> None:
        """A run as people start one."""
        command = ["prefect", "deployment", "run", "train-diffusion/train-diffusion"]
        said = self.stack.inside(*command, "--params", json.dumps(on_generated(OVERRIDES)))
        self.id = next(line for line in said.splitlines() if "UUID" in line).split()[-1]

    def state(self) -> str:
        return self.stack.servers.state(self.id)[0]

    def wait_for_step(self, key: str, step: int) -> None:
        def reached() -> bool:
            last = self.stack.inside("sh", "-c", f"tail -qn1 /data/runs/*{key}/{JOURNAL} || true").strip()
            return bool(last) and json.loads(last)["step"] >= step

        wait_for(reached)

    def wait_for_end(self) -> None:
        wait_for(lambda: self.state() in ENDS)
        assert self.state() == "COMPLETED", self.stack.run("logs", "--tail", "200", "worker")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    if shutil.which("docker") is None or subprocess.run(["docker", "compose", "ls"], capture_output=True).returncode:
        pytest.skip("no container engine answers to `docker compose`")
    containers = Containers(tmp_path_factory.mktemp("containers"))
    containers.build()
    try:
        containers.run("up", "--detach", "--wait", "--no-build")
        yield containers
    finally:
        containers.run("down", "--volumes")


@pytest.fixture(scope="module")
def undisturbed(stack: Containers) -> Training:
    training = Training(stack)
    training.wait_for_end()
    return training


def test_both_servers_are_on_loopback_and_want_a_password(stack: Containers) -> None:
    published = [
        (one["HostIp"], one["HostPort"])
        for container in stack.all()
        for ports in (container["NetworkSettings"]["Ports"] or {}).values()
        for one in ports or ()
    ]
    assert sorted(published) == sorted(("127.0.0.1", str(port)) for port in stack.ports.values())
    assert stack.ask("PREFECT_PORT", "/api/admin/version")[0] == 401
    assert stack.ask("MLFLOW_PORT", "/api/2.0/mlflow/experiments/search?max_results=1")[0] == 401
    assert stack.ask("PREFECT_PORT", "/api/admin/version", **stack.as_admin("PREFECT_PASSWORD"))[0] == 200
    assert stack.ask("MLFLOW_PORT", "/", **stack.as_admin("MLFLOW_PASSWORD"))[0] == 200
    status, page = stack.ask("PREFECT_PORT", "/dashboard", Accept="text/html")
    assert (status, b"<script" in page) == (200, True)


def test_a_model_leads_back_to_its_commit_and_is_loaded_from_outside(
    stack: Containers, undisturbed: Training, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{stack.ports['MLFLOW_PORT']}"
    (run,) = stack.servers.runs()
    assert run["status"] == "FINISHED"
    env = os.environ | {
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": stack.secrets["MLFLOW_PASSWORD"],
    }
    done = subprocess.run(
        [sys.executable, "-c", AS_A_USER, run["id"]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["2", stack.commit]


def test_whatever_dies_comes_back_and_the_weights_are_the_same(stack: Containers, undisturbed: Training) -> None:
    key = stack.servers.runs()[0]["key"]
    training = Training(stack)
    for victim, step in VICTIMS.items():
        training.wait_for_step(training.id, step)
        stack.die(victim)
    own = f"demo-seed0-{training.id}"
    wait_for(lambda: training.state() == "CRASHED")
    training.start()
    training.wait_for_step(own, STOPPED)
    stack.run("stop", "worker")
    asked = stack.run("run", "--rm", "--no-deps", "-T", "worker", "python", "-c", NEWEST, own).split()
    assert asked[0] == asked[1], "the worker was asked to end: its run leaves a checkpoint of where it is"
    stack.run("start", "worker")
    wait_for(lambda: training.state() in ENDS)
    training.start()
    training.wait_for_end()
    assert stack.inside("python", "-c", DIGEST, own) == stack.inside("python", "-c", DIGEST, key)
    losses = {one["key"]: one["losses"] for one in stack.servers.runs()}
    assert losses[own] == losses[key], "a point is missing, or there twice"


def test_no_secret_is_in_a_log_or_an_argument(stack: Containers, undisturbed: Training) -> None:
    shown = stack.run("logs", "--no-color")
    for service in VICTIMS:
        shown += stack.run("exec", "-T", service, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "train to step" in shown
    assert not [name for name, value in stack.secrets.items() if value in shown]
    for container in stack.all():
        arguments = json.dumps([container["Path"], container["Args"], container["Config"]["Cmd"]])
        assert not [name for name, value in stack.secrets.items() if value in arguments]


def test_what_runs_may_write_nowhere_but_in_its_volumes(stack: Containers) -> None:
    for command in ("touch /app/x", "touch /usr/x", "touch /images/x"):
        refused = subprocess.run(
            [*stack.command, "exec", "-T", "worker", "sh", "-c", command],
            cwd=PROJECT,
            env=stack.env,
            capture_output=True,
            text=True,
        )
        assert refused.returncode != 0, command
        assert "Read-only file system" in refused.stderr or "Permission denied" in refused.stderr
    assert stack.inside("sh", "-c", "touch /data/x && rm /data/x && id -u").strip() == "1000"
