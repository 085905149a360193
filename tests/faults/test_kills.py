"""Kill anything at any moment: the finished run has the same weights and journal, each metric once, and no process is left.

Each trial is one training that is killed several times and begun again until it is done, now with one process, now with two. What is
killed, and when, is drawn from a recorded seed: SOAK_KILLS=200 SOAK_SEED=7 pytest tests/faults/test_kills.py. The table of all kills
goes to SOAK_REPORT.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffusion.jobs.specs import TrainingJob
from diffusion.store import layout
from diffusion.training.journal import JOURNAL, records
from tests.conftest import PATIENCE, Ingested, Server, tiny_recipe
from tests.faults.report import SEED, Kill
from tests.processes import family, wait_until_ended
from tests.ranks import ForkedRank, fork

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SOAK_KILLS", "40"))
KILLS_A_TRIAL = 5
STEPS, EVERY, PROCESSES = 120, 8, 2
VICTIMS = ("rank 0", "rank 1", "caller", "rank 0 in a checkpoint")
MOMENTS_A_CHECKPOINT = 22  # half, flushed, before, after for each of five files; before and after for committed.json


@dataclass
class Trial:
    """One training, and how it is begun again and again."""

    name: str
    ingested: Ingested
    tmp_path: Path
    tracking_uri: str
    kills: list[Kill] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.tmp_path / self.name

    def prepare(self) -> None:
        self.folder.mkdir()
        recipe = tiny_recipe(
            data__images=16 * STEPS,
            data__lanes=PROCESSES,
            network__width=8,
            network__multipliers=[1, 2],
            evaluation__every_images=16 * STEPS,
            network__dropout=0.1,
        )
        job = TrainingJob(
            run=self.name,
            store=self.ingested.store.uri,
            dataset=self.ingested.manifest.digest,
            shard_copies=self.tmp_path / "copies",
            recipe=recipe,
            until=STEPS,
            checkpoint_every=EVERY,
        )
        self.told = {"job": job.model_dump(mode="json"), "tracking_uri": self.tracking_uri}
        (self.folder / "caller.log").touch()

    def begin(self, processes: int = 1, **env: str) -> ForkedRank:
        """The caller is forked; the ranks are started as the product starts them."""
        (self.folder / "caller.json").write_text(json.dumps({**self.told, "processes": processes}))
        return fork("tests.faults.caller", self.folder, self.folder / "caller.log", {**os.environ, **env})

    def step(self) -> int:
        journal = self.folder / JOURNAL
        found = records(journal.read_bytes()) if journal.exists() else []
        return int(found[-1]["step"]) if found else 0

    def finish(self, caller: ForkedRank) -> None:
        assert caller.wait(PATIENCE) == 0, (self.folder / "caller.log").read_text()[-3000:]

    def weights(self) -> str:
        store = self.ingested.store
        names = store.names(f"{layout.checkpoint(self.name, STEPS)}/")
        assert len(names) == 5
        return hashlib.sha256(
            b"".join(store.read(name) for name in names if not name.endswith("state.json"))
        ).hexdigest()

    def points(self) -> list[tuple[str, int, float]]:
        """All points of the journal's metrics in MLflow."""
        from diffusion.tracking.connection import connect

        client, run = connect(self.tracking_uri), (self.folder / "mlflow_run").read_text()
        names = ("train/loss", "train/gradient_norm", "train/learning_rate")
        return [(name, p.step, p.value) for name in names for p in client.get_metric_history(run, name)]


def tree_of(caller: ForkedRank) -> dict[str, psutil.Process]:
    """The caller and the ranks, as far as they live."""
    found: dict[str, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        found["caller"] = psutil.Process(caller.pid)
    for process in family(found["caller"]) if found else []:
        try:
            line, rank = process.cmdline(), process.environ().get("RANK")
        except psutil.Error:
            continue
        if "diffusion.training.job" in line and rank is not None:
            found[f"rank {rank}"] = process
    return found


def kill_once(trial: Trial, rng: random.Random, victim: str) -> None:
    """Begin the training, kill the victim at a random moment, and see that the whole tree is gone soon."""
    said = trial.folder / "fault"
    said.unlink(missing_ok=True)
    env = {}
    if victim == "rank 0 in a checkpoint":
        at = rng.randrange(1, 3 * MOMENTS_A_CHECKPOINT)
        interpose = str(Path(__file__).parent / "interpose")
        env = {"PYTHONPATH": interpose, "FAULT_AT": str(at), "FAULT_SAID": str(said)}
    # One in five is killed while it starts; the others some steps on.
    steps_on, delay = (
        (None, rng.uniform(0.5, 6.0)) if rng.random() < 0.2 else (rng.randrange(1, 25), rng.uniform(0, 0.2))
    )
    first_step, processes = trial.step(), 1 if victim.startswith("rank 0") else PROCESSES
    caller = trial.begin(processes, **env)
    tree: dict[str, psutil.Process] = {}
    began = looked = time.monotonic()
    while caller.poll() is None and time.monotonic() < began + 600:
        if len(tree) < 1 + processes and time.monotonic() > looked + 0.2:  # it reads of every process of the machine
            tree |= tree_of(caller)
            looked = time.monotonic()
        if victim == "rank 0 in a checkpoint":
            if said.exists():
                break
        elif steps_on is None:
            if time.monotonic() > began + delay and victim in tree:
                break
        elif trial.step() >= first_step + steps_on and victim in tree:
            time.sleep(delay)
            break
        time.sleep(0.02)
    if caller.poll() is not None:  # it was done before its time came
        assert caller.returncode == 0, (trial.folder / "caller.log").read_text()[-3000:]
        return
    assert victim in tree or said.exists(), f"{victim} did not start within {time.monotonic() - began:.0f} s"
    moment = said.read_text() if said.exists() else "starting" if steps_on is None else "training"
    step, killed = trial.step(), time.monotonic()
    if victim != "rank 0 in a checkpoint":
        with contextlib.suppress(psutil.NoSuchProcess):
            tree[victim].kill()
    caller_fails = caller.wait(PATIENCE)
    left = wait_until_ended(list(tree.values()), killed + PATIENCE)
    gone = time.monotonic() - killed
    assert left == [], f"{victim} was killed; after {gone:.0f} s {left} still run"
    if caller_fails == 0 and trial.step() == STEPS and not said.exists():  # it was done while it was looked for
        return
    assert caller_fails != 0
    trial.kills.append(Kill(trial.name, victim, moment, step, round(gone, 1)))


def victims(rng: random.Random, count: int) -> Iterator[str]:
    """Each victim equally often, in random order; checkpoints twice as often as others."""
    chosen = [(*VICTIMS, VICTIMS[-1])[index % (len(VICTIMS) + 1)] for index in range(count)]
    rng.shuffle(chosen)
    return iter(chosen)


def test_whatever_is_killed_the_run_ends_the_same(
    ingested: Ingested, tmp_path: Path, mlflow_server: Server, tell: Callable[[list[Kill]], None]
) -> None:
    undisturbed = Trial("undisturbed", ingested, tmp_path, mlflow_server.url)
    undisturbed.prepare()
    undisturbed.finish(undisturbed.begin(PROCESSES))
    weights, journal, points = undisturbed.weights(), (undisturbed.folder / JOURNAL).read_bytes(), undisturbed.points()
    assert len(points) == 3 * STEPS == len({(name, step) for name, step, _ in points})

    rng = random.Random(SEED)
    kills: list[Kill] = []
    order = victims(rng, KILLS)
    while len(kills) < KILLS:
        trial = Trial(f"trial-{len(kills)}", ingested, tmp_path, mlflow_server.url)
        trial.prepare()
        for victim in [v for _, v in zip(range(KILLS_A_TRIAL), order, strict=False)] or ["rank 0"]:
            kill_once(trial, rng, victim)
        resumed, step = time.monotonic(), trial.step()
        last = trial.begin()
        while trial.step() <= step and last.poll() is None:
            time.sleep(0.05)
        recovered = time.monotonic() - resumed
        trial.finish(last)
        assert trial.weights() == weights
        assert (trial.folder / JOURNAL).read_bytes() == journal
        assert sorted(trial.points()) == sorted(points)
        kills += [
            Kill(**{**asdict(kill), "recovered_seconds": round(recovered, 1), "identical": True})
            for kill in trial.kills
        ]
        assert trial.kills, "a trial without a kill"
    tell(kills)
