"""Kill what runs the flow: the servers that it talks to, its ranks, the flow itself, its worker. The model is the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from diffusion.data.sources.eurosat import Source
from diffusion.store.objects import FolderStore
from diffusion.training.journal import JOURNAL, records
from flows.endings import ENDING
from tests.conftest import PATIENCE
from tests.faults.flow_runs import (
    SMALL,
    FlowRun,
    flow_process,
    kept,
    kill_all,
    kill_rank,
    last_step,
    log_of,
    on_generated,
    prepare_restart,
    process,
    undisturbed,
    wait_until_back,
    weights,
)
from tests.faults.report import SEED, Kill
from tests.processes import family, wait_until_ended
from tests.stack import Project

pytestmark = pytest.mark.slow

STEPS = 250
OVERRIDES = SMALL | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS // 2}


@pytest.fixture(scope="module")
def expected(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    return undisturbed(source, tmp_path_factory.mktemp("undisturbed"), OVERRIDES)


MOMENTS = {
    "flow, cancelled": (15, 35),
    "flow": (45, 65),
    "worker": (75, 95),
    "flow and worker": (105, 125),
    "rank": (135, 155),
    "mlflow-server": (165, 185),
    "prefect-server": (195, 215),
}
"""What ends, one after the other in one training, and between which steps."""


def moment(victim: str) -> int:
    """A step to strike at, drawn from the recorded seed."""
    return random.Random(f"{SEED} {victim}").randrange(*MOMENTS[victim])


def assert_the_same(project: Project, key: str, run: FlowRun, expected: tuple[str, bytes]) -> None:
    assert weights(FolderStore(project.folder / "var/store"), key, STEPS) == expected[0]
    assert (project.folder / "var/runs" / key / JOURNAL).read_bytes() == expected[1]
    (tracked,) = [one for one in run.servers.runs() if one["key"] == key]
    assert tracked["status"] == "FINISHED"
    wanted = [[record["step"], record["loss"]] for record in records(expected[1]) if record["kind"] == "metrics"]
    assert tracked["losses"] == wanted, "a point is missing, or there twice"


def cancel(project: Project, run: FlowRun, key: str) -> tuple[int, float]:
    """As `prefect flow-run cancel` does it: the run leaves a checkpoint. The step it was at, and the seconds until it was gone."""
    processes = family(flow_process(project))
    asked = time.monotonic()
    done = project.shell("prefect", "flow-run", "cancel", run.id)
    assert done.returncode == 0, done.stderr
    run.wait_for(lambda: wait_until_ended(processes, time.monotonic()) == [])
    gone = time.monotonic() - asked
    run.wait_for(lambda: run.state()[0] == "CANCELLED")
    (tracked,) = [one for one in run.servers.runs() if one["key"] == key]
    # Prefect gives it 30 s: where these are too few, the next start tells MLflow.
    assert tracked["status"] == "KILLED" or (project.folder / "var/runs" / key / ENDING).exists(), tracked
    run.wait_for(lambda: {"CANCELLED"} <= {*run.servers.tasks(run.id)} <= {"CANCELLED", "COMPLETED"})
    step = last_step(project.folder / "var/runs" / key / JOURNAL)
    assert f"{step:09d}" in {path.name for path in (project.folder / "var/store/checkpoints" / key).iterdir()}
    return step, gone


def kill(project: Project, run: FlowRun, key: str, victim: str) -> tuple[int, float]:
    """Kill the flow, its worker or both: all that they started ends, and the run is called crashed."""
    processes = family(flow_process(project))
    killed = time.monotonic()
    worker = process(project, "worker")
    if "worker" in victim:
        worker.kill()
    if "flow" in victim:
        processes[0].kill()
    left = wait_until_ended(processes, killed + PATIENCE)
    gone = time.monotonic() - killed
    assert left == [], left
    step = last_step(project.folder / "var/runs" / key / JOURNAL)
    assert step < STEPS
    # With nobody left who could say so, the automation notices the silence.
    run.wait_for(lambda: run.state()[0] == "CRASHED")
    assert ("No heartbeat" in run.state()[1]) == (victim == "flow and worker")
    if "worker" in victim:
        wait_until_back(project, "worker", worker.pid)
    return step, gone


def test_one_training_outlives_all_that_runs_it(
    project: Project, expected: tuple[str, bytes], tell: Callable[[list[Kill]], None]
) -> None:
    """Cancelled, or killed with its flow, worker or both, the next start goes on; when ranks and servers die, the same one does.

    What `make service` keeps comes back by itself.
    """
    with kept(project):
        outlive(project, expected, tell)
    assert "worker has ended: it is started again" in log_of(project, "keeper")


def outlive(project: Project, expected: tuple[str, bytes], tell: Callable[[list[Kill]], None]) -> None:
    run = FlowRun.by_hand(project, OVERRIDES)
    key = f"demo-seed0-{run.id}"
    kills, ended = [], {}
    for victim in ("flow, cancelled", "flow", "worker", "flow and worker"):
        run.wait_for_step(moment(victim), key)
        step, gone = cancel(project, run, key) if "cancelled" in victim else kill(project, run, key, victim)
        ended[victim] = run
        started = time.monotonic()
        run = FlowRun.by_hand(project, OVERRIDES)
        run.wait_for_step(step + 1, key)
        kills.append(Kill(key, victim, "training", step, round(gone, 1), round(time.monotonic() - started, 1), True))
    for victim in ("rank", "mlflow-server", "prefect-server"):
        run.wait_for_step(moment(victim), key)
        if victim == "rank":
            kill_rank(project)
        else:
            wait_until_back(project, victim, kill_all(project, victim))
        kills.append(Kill(key, victim, "training", moment(victim), 0.0, 0.0, True))
    state = run.wait_for_end()
    assert state[0] == "COMPLETED", state
    assert_the_same(project, key, run, expected)
    for victim, dead in ended.items():
        assert not {"RUNNING", "PENDING"} & {*dead.servers.tasks(dead.id)}, (
            f"{victim}: tasks of a run that has ended say that they run"
        )
    assert ended["worker"].state()[1] == "The worker that ran it has died."
    tell(kills)


NIGHT = SMALL | {"data.images": 64, "evaluation.every_images": 64}


def test_of_missed_nights_one_is_made_up_for(project: Project) -> None:
    """The worker was away for three nights: when it is back, one of them runs, and stands for the newest."""
    restart, worker = prepare_restart(project, "worker"), process(project, "worker")
    worker.kill()
    worker.wait()
    due = [datetime.now(UTC).replace(hour=2) - timedelta(days=days) for days in (3, 2, 1)]
    before = set((project.folder / "var/runs").glob("demo-seed20*"))
    nights = [
        FlowRun.by_schedule(project, "train-diffusion", on_generated(NIGHT) | {"processes": 1}, day) for day in due
    ]
    restart()
    states = [night.wait_for_end()[0] for night in nights]
    assert sorted(states) == ["CANCELLED", "CANCELLED", "COMPLETED"]
    made = set((project.folder / "var/runs").glob("demo-seed20*")) - before
    (seed,) = {path.name.split("-")[1] for path in made}
    assert seed == f"seed{due[-1]:%Y%m%d}"
