"""Nights on end, with and without a kill, and Sundays' clean-up: what is there in the end is what must be. `make soak-nights N=60`."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffusion.data.sources.eurosat import Source
from diffusion.store.objects import FolderStore
from diffusion.training.journal import JOURNAL
from diffusion.training.state import steps_with_checkpoint
from tests.faults.flow_runs import (
    SMALL,
    FlowRun,
    flow_process,
    kill_and_restart,
    kill_rank,
    on_generated,
    prepare_restart,
    process,
    undisturbed,
    weights,
)
from tests.faults.report import SEED, Kill
from tests.processes import family
from tests.stack import Project

pytestmark = [pytest.mark.slow, pytest.mark.long]

NIGHTS = int(os.environ.get("SOAK_NIGHTS", "1"))
STEPS = 80
OVERRIDES = SMALL | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS}
VICTIMS = (None, "rank", "flow", "worker", "mlflow-server", "prefect-server", "flow and worker")
KEPT = 3
"""Runs, versions and past champions that the clean-up keeps."""


def strike(project: Project, victim: str, away: float) -> None:
    """Kill it, and start again what does not start by itself."""
    if victim == "rank":
        return kill_rank(project)
    if victim.endswith("-server"):
        return kill_and_restart(project, victim, away)
    restart = prepare_restart(project, "worker")
    flow = flow_process(project)
    processes = family(flow)
    if "worker" in victim:
        process(project, "worker").kill()
    if "flow" in victim:
        flow.kill()
    psutil.wait_procs(processes, timeout=120)
    if "worker" in victim:
        restart()


def test_nights_end_with_what_they_must_whatever_was_killed(
    project: Project, source: Source, tmp_path: Path, tell: Callable[[list[Kill]], None]
) -> None:
    rng, store = random.Random(f"{SEED} nights"), FolderStore(project.folder / "var/store")
    first = datetime.now(UTC).replace(hour=2, minute=0, second=0, microsecond=0) - timedelta(days=NIGHTS)
    keys, kills = [], []
    for night in range(NIGHTS):
        due, victim, step = first + timedelta(days=night), rng.choice(VICTIMS), rng.randrange(5, STEPS // 2)
        run = FlowRun.by_schedule(project, "train-diffusion", on_generated(OVERRIDES), due)
        key = f"demo-seed{due:%Y%m%d}-{run.id}"
        keys.append(key)
        began = time.monotonic()
        if victim is not None:
            run.wait_for_step(step, key)
            strike(project, victim, rng.uniform(1, 6))
        while run.wait_for_end()[0] == "CRASHED":
            run.retry()
        state = run.state()
        assert state[0] == "COMPLETED", state
        expected = undisturbed(source, tmp_path, OVERRIDES, int(f"{due:%Y%m%d}"))
        assert weights(store, key, STEPS) == expected[0], (key, victim)
        assert (project.folder / "var/runs" / key / JOURNAL).read_bytes() == expected[1], (key, victim)
        kills.append(Kill(key, victim or "nothing", "night", step, 0.0, round(time.monotonic() - began, 1), True))
        if night == NIGHTS - 1 or due.weekday() == 6:
            sunday = {"keep_runs": KEPT, "keep_versions": KEPT, "keep_champions": KEPT}
            assert FlowRun.by_schedule(project, "clean-up", sunday, due).wait_for_end()[0] == "COMPLETED"
    check_runs(run.servers.runs(), keys)
    live = check_promotions(store)
    check_disk(project, store, keys, live)
    tell(kills)


def check_runs(runs: list[dict[str, Any]], keys: list[str]) -> None:
    """Each night is one finished run, with each point once."""
    assert sorted(run["key"] for run in runs) == sorted(keys)
    for run in runs:
        assert (run["status"], run["failure"]) == ("FINISHED", "")
        assert run["seed"] == run["key"].split("-")[1].removeprefix("seed")
        assert [step for step, _ in run["losses"]] == list(range(1, STEPS + 1))


def check_promotions(store: FolderStore) -> list[str]:
    """Each promotion went on from the one before it. Returns the versions that were champion, the newest last."""
    names = sorted(name for name in store.names("promotions/") if name.endswith(".json"))
    entries = [json.loads(store.read(name)) for name in names]
    assert [entry["from"] for entry in entries] == [None, *(entry["to"] for entry in entries)][: len(entries)]
    assert all(gate["passed"] for entry in entries for gate in entry["gates"])
    return [entry["to"] for entry in entries]


def check_disk(project: Project, store: FolderStore, keys: list[str], live: list[str]) -> None:
    """Checkpoints and pictures of the newest runs and of the last champions, and nothing that was begun and left."""
    kept = {key for key in keys if steps_with_checkpoint(store, key)}
    champions = {keys[int(version) - 1] for version in live[-KEPT:]}
    assert kept == {*keys[-KEPT:], *champions}
    assert {path.name for path in (project.folder / "var/runs").glob("demo-*")} == kept
    assert {name.split("/")[1] for name in store.names("runs/") if name.endswith(".png")} == kept
    left = [path for path in (project.folder / "var").rglob("*.part*") if "prefect" not in path.parts]
    assert left == []
