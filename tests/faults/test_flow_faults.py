"""Kill what runs the flow: the servers that it talks to, its ranks, the flow itself, its worker. The model is the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from diffusion.data.ingest import ingest
from diffusion.data.sources.eurosat import Source
from diffusion.data.store import FolderStore
from diffusion.job import TrainingJob
from diffusion.recipe_files import load_recipe
from diffusion.training.journal import JOURNAL, records
from flows.launcher import run_job
from tests.conftest import TINY
from tests.faults.conftest import SEED
from tests.faults.report import Kill
from tests.processes import wait_until_ended
from tests.stack import Project, running_project

pytestmark = pytest.mark.slow

STEPS = 250
OVERRIDES = TINY | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS // 2}
GONE_SECONDS = 90.0
"""Patience, not a promise: how long it took is in the table."""
COMMIT = "c" * 40

QUERIES = """
import asyncio, json, sys
from prefect import get_client
from mlflow import MlflowClient
async def main():
    async with get_client() as client:
        run = await client.read_flow_run(sys.argv[1])
        state = [run.state.type.value, run.state.message or ""]
    tracking = MlflowClient()
    experiment = tracking.get_experiment_by_name("train-diffusion")
    runs = tracking.search_runs([experiment.experiment_id]) if experiment else []
    found = [{"status": r.info.status, "failure": r.data.tags.get("failure", ""), "key": r.data.tags["train_diffusion.run"],
              "losses": [[p.step, p.value] for p in tracking.get_metric_history(r.info.run_id, "train/loss")]} for r in runs]
    print(json.dumps({"state": state, "runs": found}))
asyncio.run(main())
"""


MISSED = """
import asyncio, json, sys
from datetime import UTC, datetime, timedelta
from prefect import get_client
from prefect.states import Scheduled
async def main():
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("train-diffusion/train-diffusion")
        parameters = {"preset": "demo", "source": "generated", "overrides": json.loads(sys.argv[1])}
        for days in (3, 2, 1):
            due = datetime.now(UTC).replace(hour=2) - timedelta(days=days)
            state = Scheduled(scheduled_time=due)
            run = await client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, state=state, tags=["auto-scheduled"]
            )
            print(run.id, due.strftime("%Y%m%d"))
asyncio.run(main())
"""
STATES = """
import asyncio, json, sys
from prefect import get_client
async def main():
    async with get_client() as client:
        print(json.dumps([(await client.read_flow_run(run)).state.type.value for run in sys.argv[1:]]))
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Project]:
    with running_project(
        tmp_path_factory.mktemp("faults"), archive, TRAIN_DIFFUSION_COMMIT=COMMIT, MLFLOW_DISABLE_TELEMETRY="true"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def expected(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Weights and journal of an undisturbed training."""
    tmp_path = tmp_path_factory.mktemp("undisturbed")
    store = FolderStore(tmp_path / "store")
    manifest = ingest(source, store)  # cut into shards as the flow does it: the order depends on them
    job = TrainingJob(
        run="undisturbed",
        store=store.uri,
        dataset=manifest.digest,
        shard_copies=tmp_path,
        recipe=load_recipe("demo", OVERRIDES),
        until=STEPS,
        checkpoint_every=1000,
    )
    run_job("diffusion.training.job", job, tmp_path / "job", 1, lambda p: None, lambda line: None, threads=1)
    return weights(store, "undisturbed"), (tmp_path / "job" / JOURNAL).read_bytes()


def moment(victim: str) -> int:
    """A step to strike at, drawn from the recorded seed."""
    return random.Random(f"{SEED} {victim}").randrange(10, 180)


def weights(store: FolderStore, run: str) -> str:
    where = f"checkpoints/{run}/{STEPS:09d}"
    return hashlib.sha256(
        b"".join(store.read(f"{where}/{part}.safetensors") for part in ("model", "optimizer"))
    ).hexdigest()


class FlowRun:
    """One run of the deployment."""

    def __init__(self, project: Project) -> None:
        self.project = project
        parameters = {"preset": "demo", "source": "generated", "overrides": OVERRIDES}
        command = ["prefect", "deployment", "run", "train-diffusion", "--params", json.dumps(parameters)]
        done = project.shell(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        self.id = next(line for line in done.stdout.splitlines() if "UUID" in line).split()[-1]

    def told(self) -> dict[str, Any]:
        done = self.project.shell(sys.executable, "-c", QUERIES, self.id, env=self.project.servers)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(json.loads(done.stdout))

    def journals(self) -> list[Path]:
        return list((self.project.folder / "var/runs").glob(f"demo-*/{JOURNAL}"))

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600  # patience: a busy machine fails nothing
        while not what():
            assert time.monotonic() < deadline, log_of(self.project, "worker")
            time.sleep(0.1)

    def wait_for_step(self, step: int, key: str = "") -> None:
        self.wait_for(lambda: any(last_step(path) >= step for path in self.journals() if key in str(path)))

    def wait_for_end(self) -> dict[str, Any]:
        self.wait_for(lambda: self.told()["state"][0] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"))
        return self.told()


def last_step(journal: Path) -> int:
    found = records(journal.read_bytes())
    return int(found[-1]["step"]) if found else 0


def log_of(project: Project, name: str) -> str:
    return (project.folder / f"var/stack/{name}.log").read_text()[-3000:]


def process(project: Project, name: str) -> psutil.Process:
    return psutil.Process(int((project.folder / f"var/stack/{name}.pid").read_text().split()[0]))


def flow_process(project: Project) -> psutil.Process:
    """The flow's own process: the worker's child."""
    (child,) = process(project, "worker").children()
    return child


def kill_rank(project: Project) -> None:
    """Kill rank 0 of the job that runs now; between two jobs there is none for a while."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for child in flow_process(project).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                if child.environ().get("RANK") == "0":
                    return child.kill()
        time.sleep(0.05)
    raise AssertionError("there was no rank to kill")


def prepare_restart(project: Project, name: str) -> Callable[[], None]:
    """What starts a process of the stack again as it was started: ask while it lives."""
    command, env = process(project, name).cmdline(), process(project, name).environ()

    def restart() -> None:
        with (project.folder / f"var/stack/{name}.log").open("ab") as log:
            started = subprocess.Popen(
                command, cwd=project.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        created = psutil.Process(started.pid).create_time()
        (project.folder / f"var/stack/{name}.pid").write_text(f"{started.pid} {created}")

    return restart


def kill_and_restart(project: Project, name: str, away: float) -> None:
    """Kill a server with all its children, and start it again with the same command after a while."""
    restart, server = prepare_restart(project, name), process(project, name)
    for one in [*server.children(recursive=True), server]:
        one.kill()
    time.sleep(away)
    restart()
    health = {
        "prefect-server": f"{project.servers['PREFECT_API_URL']}/health",
        "mlflow-server": f"{project.servers['MLFLOW_TRACKING_URI']}/health",
    }
    deadline = time.monotonic() + 240
    while name in health:
        try:
            requests.get(health[name], timeout=2)
            break
        except requests.RequestException:
            assert time.monotonic() < deadline, log_of(project, name)
            time.sleep(0.2)


def assert_the_same(project: Project, key: str, told: dict[str, Any], expected: tuple[str, bytes]) -> None:
    assert weights(FolderStore(project.folder / "var/store"), key) == expected[0]
    assert (project.folder / "var/runs" / key / JOURNAL).read_bytes() == expected[1]
    (run,) = [run for run in told["runs"] if run["key"] == key]
    assert run["status"] == "FINISHED"
    wanted = [[record["step"], record["loss"]] for record in records(expected[1]) if record["kind"] == "metrics"]
    assert run["losses"] == wanted, "a point is missing, or there twice"


def test_a_rank_and_servers_that_die_cost_neither_a_step_nor_a_point(
    project: Project, expected: tuple[str, bytes], tell: Callable[[list[Kill]], None]
) -> None:
    run = FlowRun(project)
    key = f"demo-seed0-{run.id}"
    strikes = sorted((moment(victim), victim) for victim in ("rank", "mlflow-server", "prefect-server"))
    for step, victim in strikes:
        run.wait_for_step(step, key)
        if victim == "rank":
            kill_rank(project)
        else:
            kill_and_restart(project, victim, away=random.Random(step).uniform(1, 6))
    told = run.wait_for_end()
    assert told["state"][0] == "COMPLETED", told["state"]
    assert_the_same(project, key, told, expected)
    tell([Kill(key, victim, "training", step, 0.0, 0.0, True) for step, victim in strikes])


def test_cancelled_it_leaves_a_checkpoint_and_the_next_start_goes_on(
    project: Project, expected: tuple[str, bytes], tell: Callable[[list[Kill]], None]
) -> None:
    run = FlowRun(project)
    key = f"demo-seed0-{run.id}"
    run.wait_for_step(moment("cancelled"), key)
    tree = [flow_process(project), *flow_process(project).children(recursive=True)]
    asked = time.monotonic()
    done = project.shell("prefect", "flow-run", "cancel", run.id)
    assert done.returncode == 0, done.stderr
    run.wait_for(lambda: wait_until_ended(tree, time.monotonic()) == [])
    gone = time.monotonic() - asked
    run.wait_for(lambda: run.told()["state"][0] == "CANCELLED")
    (tracked,) = [one for one in run.told()["runs"] if one["key"] == key]
    assert tracked["status"] == "KILLED"
    step = last_step(project.folder / "var/runs" / key / JOURNAL)
    assert f"{step:09d}" in {path.name for path in (project.folder / "var/store/checkpoints" / key).iterdir()}
    started = time.monotonic()
    again = FlowRun(project)
    again.wait_for_step(step + 1, key)
    recovered = time.monotonic() - started
    told = again.wait_for_end()
    assert told["state"][0] == "COMPLETED", told["state"]
    assert_the_same(project, key, told, expected)
    tell([Kill(key, "flow, cancelled", "training", step, round(gone, 1), round(recovered, 1), True)])


def test_of_missed_nights_one_is_made_up_for(project: Project) -> None:
    """The worker was away for three nights: when it is back, one of them runs, and stands for the newest."""
    restart, worker = prepare_restart(project, "worker"), process(project, "worker")
    worker.kill()
    worker.wait()
    done = project.shell(sys.executable, "-c", MISSED, json.dumps(TINY), env=project.servers)
    assert done.returncode == 0, done.stderr[-2000:]
    nights = dict(line.split() for line in done.stdout.splitlines())
    restart()
    deadline = time.monotonic() + 600
    states: list[str] = []
    while not states or {*states} - {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}:
        assert time.monotonic() < deadline, states
        time.sleep(1)
        states = json.loads(project.shell(sys.executable, "-c", STATES, *nights, env=project.servers).stdout)
    assert sorted(states) == ["CANCELLED", "CANCELLED", "COMPLETED"]
    (seed,) = {path.name.split("-")[1] for path in (project.folder / "var/runs").glob("demo-seed20*")}
    assert seed == f"seed{max(nights.values())}"


@pytest.mark.parametrize("victim", ["flow", "worker", "flow and worker"])
def test_what_dies_with_the_flow_is_closed_and_picked_up_by_the_next_start(
    project: Project, expected: tuple[str, bytes], tell: Callable[[list[Kill]], None], victim: str
) -> None:
    run = FlowRun(project)
    key = f"demo-seed0-{run.id}"
    run.wait_for_step(moment(victim), key)
    tree = [flow_process(project), *flow_process(project).children(recursive=True)]
    killed = time.monotonic()
    restart = prepare_restart(project, "worker")
    if "worker" in victim:
        process(project, "worker").kill()
    if "flow" in victim:
        tree[0].kill()
    left = wait_until_ended(tree, killed + GONE_SECONDS)
    gone = time.monotonic() - killed
    assert left == [], left
    step = last_step(project.folder / "var/runs" / key / JOURNAL)
    assert step < STEPS
    # With nobody left who could say so, the automation notices the silence.
    run.wait_for(lambda: run.told()["state"][0] == "CRASHED")
    assert ("No heartbeat" in run.told()["state"][1]) == (victim == "flow and worker")
    if "worker" in victim:
        restart()

    started = time.monotonic()
    again = FlowRun(project)
    again.wait_for_step(step + 1, key)
    recovered = time.monotonic() - started
    told = again.wait_for_end()
    assert told["state"][0] == "COMPLETED", told["state"]
    assert_the_same(project, key, told, expected)
    tell([Kill(key, victim, "training", step, round(gone, 1), round(recovered, 1), True)])
