"""Flow runs of a real stack, and what is needed to kill whatever has a part in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests

from diffusion.data.ingest import ingest
from diffusion.data.sources.source import Source
from diffusion.jobs.specs import TrainingJob
from diffusion.jobs.started import started
from diffusion.recipe_files import load_recipe
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.training.journal import JOURNAL, records
from flows.launcher import run_job
from tests.conftest import PATIENCE, TINY
from tests.processes import family
from tests.servers import Servers
from tests.stack import Project

RETRY = """
import asyncio, sys
from prefect import get_client
from prefect.states import AwaitingRetry
async def main():
    async with get_client() as client:
        await client.set_flow_run_state(sys.argv[1], AwaitingRetry(), force=True)
asyncio.run(main())
"""
SMALL = TINY | {"network.multipliers": [1, 2]}
"""A recipe for trainings of many steps: what befalls them is the same at two resolutions as at three."""
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def weights(store: FolderStore, run: str, step: int) -> str:
    """The digest of a checkpoint's weights, of their averages and of the optimiser."""
    parts = [name for name in store.names(f"{layout.checkpoint(run, step)}/") if name.endswith(".safetensors")]
    assert len(parts) == 3, parts
    return hashlib.sha256(b"".join(map(store.read, parts))).hexdigest()


def undisturbed(source: Source, folder: Path, overrides: dict[str, Any], seed: int = 0) -> tuple[str, bytes]:
    """Weights and journal of the same training by one process, without servers or kills."""
    store, recipe = FolderStore(folder / "store"), load_recipe("demo", overrides, seed)
    steps = recipe.data.images // recipe.data.batch_size
    job = TrainingJob(
        run=f"seed-{seed}",
        store=store.uri,
        dataset=ingest(source, store).digest,  # cut into shards as the flow does it: the order depends on them
        shard_copies=folder,
        recipe=recipe,
        until=steps,
        checkpoint_every=steps,
    )
    run_job("diffusion.training.job", job, folder / job.run, 1, threads=1)
    return weights(store, job.run, steps), (folder / job.run / JOURNAL).read_bytes()


def on_generated(overrides: dict[str, Any]) -> dict[str, Any]:
    """Parameters of a small run."""
    return {"preset": "demo", "source": "generated", "overrides": overrides, "fid_bar": 1000.0}


class FlowRun:
    """One run of a deployment."""

    def __init__(self, project: Project, run: str) -> None:
        self.project, self.id = project, run

    @classmethod
    def by_hand(cls, project: Project, overrides: dict[str, Any]) -> FlowRun:
        """Of the training, as people start one; their command has imported for three seconds before it asks for the same."""
        servers = Servers.of(project.servers)
        return cls(project, servers.begin("train-diffusion", on_generated(overrides)))

    @classmethod
    def by_schedule(cls, project: Project, name: str, parameters: dict[str, Any], due: datetime) -> FlowRun:
        """As the scheduler makes one."""
        return cls(project, Servers.of(project.servers).begin(name, parameters, due))

    def retry(self) -> None:
        """As the button of the page does it."""
        done = self.project.shell(sys.executable, "-c", RETRY, self.id, env=self.project.servers)
        assert done.returncode == 0, done.stderr[-2000:]

    @property
    def servers(self) -> Servers:
        return Servers.of(self.project.servers)

    def state(self) -> tuple[str, str]:
        return self.servers.state(self.id)

    def journals(self) -> list[Path]:
        return list((self.project.folder / "var/runs").glob(f"demo-*/{JOURNAL}"))

    def wait_for(self, what: Callable[[], bool], every: float = 0.5) -> None:
        """Asks a server not more often than it can answer beside its work."""
        deadline = time.monotonic() + PATIENCE  # patience: a busy machine fails nothing
        while not what():
            assert time.monotonic() < deadline, f"{self.state()}\n{log_of(self.project, 'worker')}"
            time.sleep(every)

    def wait_for_step(self, step: int, key: str = "") -> None:
        self.wait_for(lambda: any(last_step(path) >= step for path in self.journals() if key in str(path)), 0.1)

    def wait_for_end(self) -> tuple[str, str]:
        self.wait_for(lambda: self.state()[0] in ENDS)
        return self.state()


def last_step(journal: Path) -> int:
    found = records(journal.read_bytes())
    return int(found[-1]["step"]) if found else 0


def log_of(project: Project, name: str) -> str:
    return (project.folder / f"var/stack/{name}.log").read_text(errors="replace")[-3000:]


def process(project: Project, name: str) -> psutil.Process:
    return psutil.Process(int((project.folder / f"var/stack/{name}.pid").read_text().split()[0]))


def flow_process(project: Project) -> psutil.Process:
    """The flow's own process: the worker's child."""
    (child,) = process(project, "worker").children()
    return child


def kill_rank(project: Project) -> None:
    """Kill rank 0 of the job that runs now; between two jobs there is none for a while."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for child in family(flow_process(project)):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if child.environ().get("RANK") == "0":
                    return child.kill()
        time.sleep(0.05)
    raise AssertionError("there was no rank to kill")


@contextmanager
def kept(project: Project) -> Iterator[None]:
    """With what `make service` has systemd run; but systemd, if it is there, is told nothing."""
    ports = {
        variable: str(urlsplit(project.servers[address]).port)
        for variable, address in (("PREFECT_PORT", "PREFECT_API_URL"), ("MLFLOW_PORT", "MLFLOW_TRACKING_URI"))
    }
    with (project.folder / "var/stack/keeper.log").open("wb") as log:
        keeper = subprocess.Popen(installed(project, ports), cwd="/", env=project.env | ports, stdout=log, stderr=log)
    try:
        yield
    finally:
        keeper.terminate()
        assert keeper.wait(PATIENCE) == 0, log_of(project, "keeper")


def installed(project: Project, ports: dict[str, str]) -> list[str]:
    """What `make service` says that it would have systemd run."""
    install = [sys.executable, str(project.folder / "infra/service.py"), "install"]
    if os.geteuid() == 0:  # whose unit would be the machine's
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
            return [*install[:2], "keep"]
        hidden = 'mount -t tmpfs tmpfs /etc/systemd/system && exec "$@"'
        install = ["unshare", "--mount", "sh", "-c", hidden, "sh", *install]
    told = project.shell(*install, env=ports)
    assert "systemd can't be asked here" in told.stderr, told.stdout + told.stderr
    (command,) = [line for line in told.stderr.splitlines() if line.startswith("Without it")]
    return shlex.split(command.partition("run this: ")[2])


def prepare_restart(project: Project, name: str) -> Callable[[], None]:
    """What starts a process of the stack again as it was started: ask while it lives."""
    command, env = process(project, name).cmdline(), process(project, name).environ()

    def restart() -> None:
        with (project.folder / f"var/stack/{name}.log").open("ab") as log:
            begun = subprocess.Popen(
                command, cwd=project.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        (project.folder / f"var/stack/{name}.pid").write_text(f"{begun.pid} {started(begun.pid)}")

    return restart


def kill_and_restart(project: Project, name: str, away: float) -> None:
    """Kill a server with all its children, and start it again with the same command after a while."""
    restart = prepare_restart(project, name)
    kill_all(project, name)
    time.sleep(away)
    restart()
    wait_until_healthy(project, name)


def kill_all(project: Project, name: str) -> int:
    """Kill a process of the stack with all its children; returns its pid."""
    root = process(project, name)
    for one in family(root):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return root.pid


def wait_until_back(project: Project, name: str, pid: int) -> None:
    """Wait until whatever keeps the stack has started in its place what was killed."""
    deadline = time.monotonic() + PATIENCE
    while int((project.folder / f"var/stack/{name}.pid").read_text().split()[0]) == pid:
        assert time.monotonic() < deadline, f"{name} does not come back"
        time.sleep(0.1)
    wait_until_healthy(project, name)


def wait_until_healthy(project: Project, name: str) -> None:
    """Wait until a server answers."""
    health = {
        "prefect-server": f"{project.servers['PREFECT_API_URL']}/health",
        "mlflow-server": f"{project.servers['MLFLOW_TRACKING_URI']}/health",
    }
    deadline = time.monotonic() + PATIENCE
    while name in health:
        try:
            requests.get(health[name], timeout=2)
            break
        except requests.RequestException:
            assert time.monotonic() < deadline, log_of(project, name)
            time.sleep(0.2)
