"""MLflow on bad days, through the failing proxy: each point arrives once, and nobody waits."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from diffusion.tracking.connection import connect
from diffusion.tracking.run import Lineage, TrackedRun, open_experiment
from diffusion.tracking.sender import MetricsSender
from diffusion.training.journal import COMMITTED, JOURNAL, TIMING, Journal
from tests.conftest import Ingested, Server, tiny_recipe
from tests.faults.s3_proxy import Faults, proxy

pytestmark = pytest.mark.slow

LINEAGE = Lineage(run="mlflow-faults", commit="c" * 40, flow_run_id="f", flow_run_url="", owner="{}")


def test_points_whose_answer_was_lost_and_a_silent_server_cost_nothing(
    mlflow_server: Server, ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion.tracking.sender.POLL_SECONDS", 0.05)
    monkeypatch.setattr("diffusion.tracking.sender.RETRY_SECONDS", 0.2)
    direct = connect(mlflow_server.url)
    run = TrackedRun.open(
        direct, open_experiment(direct, None), "faults", LINEAGE, tiny_recipe(), ingested.manifest, ingested.store.uri
    )
    faults = Faults(unavailable=0.3, lost_answer=0.4, seed=2)
    journal, timing = Journal(tmp_path / JOURNAL), Journal(tmp_path / TIMING)
    with proxy(mlflow_server.url, faults) as url:
        through = TrackedRun(connect_without_asking(url), run.run_id, run.experiment_id, run.started)
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


def connect_without_asking(url: str):  # type: ignore[no-untyped-def]
    """A client of the proxy: the question whether the server answers would meet its faults."""
    from mlflow import MlflowClient

    return MlflowClient(url, url)
