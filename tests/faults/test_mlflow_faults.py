"""MLflow on bad days, through the failing proxy: each point arrives once, and nobody waits."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion.jobs.lock import LOCK, lock_folder
from diffusion.jobs.started import started
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import open_experiment
from diffusion.tracking.run import Lineage, TrackedRun
from diffusion.tracking.sender import MetricsSender
from diffusion.training.journal import COMMITTED, JOURNAL, TIMING, Journal
from diffusion.trust.private import write_private
from flows.endings import ENDING, Ending, close_abandoned
from flows.owner import FLOW_FOLDER, OWNER, this_process
from flows.run import close
from tests.conftest import Ingested, Server, tiny_recipe
from tests.faults.s3_proxy import Faults, proxy

pytestmark = pytest.mark.slow

LINEAGE = Lineage(key="mlflow-faults", name="faults", commit="c" * 40, flow_run_id="f", flow_run_url="", owner="{}")


def test_points_whose_answer_was_lost_and_a_silent_server_cost_nothing(
    mlflow_server: Server, ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tracking.sender.POLL_SECONDS", 0.05)
    monkeypatch.setattr("diffusion.tracking.sender.RETRY_SECONDS", 0.2)
    monkeypatch.setattr("diffusion.tracking.connection.AGAIN_SECONDS", 0.2)
    direct = connect(mlflow_server.url)
    run = TrackedRun.open(
        direct, open_experiment(direct, None), LINEAGE, tiny_recipe(), ingested.manifest, ingested.store.uri
    )
    faults = Faults(unavailable=0.3, lost_answer=0.4, seed=2)
    journal, timing = Journal(tmp_path / JOURNAL), Journal(tmp_path / TIMING)
    with proxy(mlflow_server.url, faults) as url:
        through = TrackedRun(connect_without_asking(url), run.run_id, run.experiment_id, run.started, run.name)
        with MetricsSender(through, tmp_path) as sender:
            for step in range(1, 201):
                journal.append(
                    {"step": step, "kind": "metrics", "loss": 1 / step, "learning_rate": 1.0, "gradient_norm": 2.0}
                )
                timing.append({"step": step, "images_per_second": 1.0, "data_wait_share": 0.0, "peak_memory_bytes": 1})
                if step % 10 == 0:
                    (tmp_path / COMMITTED).write_text(json.dumps({"step": step, "digest": "d"}))
                    faults.unavailable = 1.0 if 50 <= step < 100 else 0.3  # away for a while
                    time.sleep(0.1)
            sender.flush()
    assert faults.seen["lost_answer"] > 0
    assert faults.seen["unavailable"] > 0
    points = [(p.step, p.value) for p in direct.get_metric_history(run.run_id, "train/loss")]
    assert points == [(step, 1 / step) for step in range(1, 201)]


def test_a_server_that_is_away_as_the_run_ends_is_waited_for_or_told_by_the_next_start(
    mlflow_server: Server, ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tracking.connection.AGAIN_SECONDS", 0.2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    direct = connect(mlflow_server.url)
    experiment = open_experiment(direct, None)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    ended = json.loads(this_process()) | {"pid": child.pid, "started": started(child.pid)}
    child.wait()

    def begin(key: str) -> tuple[TrackedRun, Path]:
        lineage = replace(LINEAGE, key=key, name=key, owner=json.dumps(ended))
        folder = tmp_path / key
        folder.mkdir()
        run = TrackedRun.open(direct, experiment, lineage, tiny_recipe(), ingested.manifest, ingested.store.uri)
        return run, folder

    faults = Faults(unavailable=1.0)
    with proxy(mlflow_server.url, faults) as url:
        waited, folder = begin("restarted")
        threading.Thread(target=heal_once_asked, args=[faults], daemon=True).start()
        through = TrackedRun(connect_without_asking(url), waited.run_id, experiment, waited.started, waited.name)
        close(through, folder, Ending(status="FINISHED"))
        assert faults.seen["unavailable"] > 0
        assert direct.get_run(waited.run_id).info.status == "FINISHED"
        assert list(folder.iterdir()) == []

        faults.unavailable = 1.0
        monkeypatch.setattr("diffusion.tracking.connection.PATIENCE_SECONDS", 0.0)
        endings = {
            "finished": Ending(status="FINISHED"),
            "failed": Ending(status="FAILED", reason="no data"),
            "killed": Ending(status="KILLED", reason="TerminationSignal"),
        }
        runs = {}
        for key, ending in endings.items():
            run, folder = begin(key)
            runs[key] = run.run_id
            close(
                TrackedRun(connect_without_asking(url), run.run_id, experiment, run.started, run.name), folder, ending
            )
            assert direct.get_run(run.run_id).info.status == "RUNNING"
    silent, _ = begin("silent")
    close_abandoned(direct, experiment, LINEAGE.flow_run_id, tmp_path)
    assert list(tmp_path.rglob(ENDING)) == [], "the next attempt would end as this one"
    for key, ending in endings.items():
        told = direct.get_run(runs[key])
        assert (told.info.status, told.data.tags.get("failure", "")) == (ending.status, ending.reason)
    told = direct.get_run(silent.run_id)
    assert told.info.status == "FAILED"
    assert "ended without a word" in told.data.tags["failure"]


def test_the_run_of_a_machine_that_is_gone_is_closed_and_of_one_that_lives_is_not(
    mlflow_server: Server, ingested: Ingested, tmp_path: Path
) -> None:
    """As on a cluster, where a job begins again on another node, and sees what the first one wrote.

    Where it sees no such folder, or one that it had itself once, only long silence would tell.
    """
    client = connect(mlflow_server.url)
    experiment = open_experiment(client, None)
    elsewhere = json.dumps(json.loads(this_process()) | {"host": "a node that is gone"})
    keys = ("gone", "locked", "writing", "not seen here", "was here once")
    runs = {}
    for key in keys:
        lineage = replace(LINEAGE, key=key.replace(" ", "-"), name=key, owner=elsewhere)
        run = TrackedRun.open(client, experiment, lineage, tiny_recipe(), ingested.manifest, ingested.store.uri)
        runs[key] = run.run_id
        if key != "not seen here":
            lock_folder(tmp_path / lineage.key / FLOW_FOLDER).close()
            write_private(
                tmp_path / lineage.key / FLOW_FOLDER / OWNER, this_process() if key == "was here once" else elsewhere
            )
            for path in tmp_path.joinpath(lineage.key).rglob("*"):
                os.utime(path, (time.time() - 600,) * 2)
    (tmp_path / "writing" / "progress.json").write_text("{}")
    with (tmp_path / "locked" / FLOW_FOLDER / LOCK).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        close_abandoned(client, experiment, LINEAGE.flow_run_id, tmp_path)
    states = {key: client.get_run(run_id).info.status for key, run_id in runs.items()}
    assert states == dict.fromkeys(keys, "RUNNING") | {"gone": "FAILED"}
    for run_id in runs.values():
        client.set_terminated(run_id, "KILLED")


def heal_once_asked(faults: Faults) -> None:
    while not faults.seen.get("unavailable"):
        time.sleep(0.05)
    faults.unavailable = 0.0


def connect_without_asking(url: str):  # type: ignore[no-untyped-def]
    """A client of the proxy: the question whether the server answers would meet its faults."""
    from mlflow import MlflowClient

    return MlflowClient(url, url)
