"""The whole flow on a small generated set, against Prefect's test harness and MLflow on SQLite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from diffusion.data import generated
from diffusion.data.find import find_archive
from diffusion.errors import DataError, RecipeError, StoreError, TrackingError
from diffusion.settings import settings
from diffusion.tracking.connection import connect
from diffusion.tracking.promotion import champion_version
from tests.conftest import TINY

pytestmark = pytest.mark.slow

MODEL = f"{generated.NAME}-ddpm"


@pytest.fixture
def run_flow(prefect_server: None, home: Path, archive: Path) -> Any:
    """Runs the flow on the tiny recipe, on the small generated archive."""
    place = settings().downloads / f"{generated.NAME}-{generated.VERSION}.zip"
    place.parent.mkdir(parents=True)
    place.symlink_to(archive)

    def run(**parameters: Any) -> Any:
        from flows.train_diffusion import train_diffusion

        overrides = TINY | parameters.pop("overrides", {})
        chosen: dict[str, Any] = {"preset": "demo", "source": "generated", "processes": 1} | parameters
        return train_diffusion(**chosen, overrides=overrides)

    return run


def states_by_task() -> dict[str, list[str]]:
    """State names of the task runs of the newest flow run, by task name without its counter."""
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        tasks = client.read_task_runs(
            task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[newest.id]))
        )
    found: dict[str, list[str]] = {}
    for run in tasks:
        name = run.name.rpartition("-")[0] if run.name.startswith(("find", "ingest", "measure", "report")) else run.name
        found.setdefault(name, []).append(run.state_name or "")
    return found


def test_the_flow_trains_scores_registers_and_competes(run_flow: Any, home: Path) -> None:
    first = run_flow()
    assert "champion" in first.rows["model version"]
    assert first.rows["dataset"].startswith("generated-fields-and-water")
    client = connect(settings().tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1, 17))
    assert losses[-1].value < losses[0].value
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "score/fid_eurosat")] == [8, 16]
    assert (
        len(
            [
                i
                for i in client.list_artifacts(run.info.run_id, "images")
                if "/samples+" in i.path and i.path.endswith(".png")
            ]
        )
        == 2
    )
    assert client.list_artifacts(run.info.run_id, "figures")
    assert run.data.tags["dataset.name"] == "generated-fields-and-water"
    tasks = states_by_task()
    assert tasks["ingest"] == ["Completed"]
    assert tasks["train to step 8"] == tasks["train to step 16"] == ["Completed"]

    # Again: ingestion and reference are found, a second version competes with the first.
    second = run_flow()
    assert f"{MODEL} 2" in second.rows["model version"]
    assert states_by_task()["ingest"] == ["Cached"]
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert str(champion.version) == "1", "the same recipe gives the same model, which is not better than itself"
    assert first.rows["fid_eurosat"] == second.rows["fid_eurosat"]
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2

    # The shards are gone, the cache entry is not: they are made again.
    for file in (home / "store" / "datasets").rglob("manifest.json"):
        file.unlink()
    run_flow(overrides={"data.images": 128})
    assert states_by_task()["ingest"] == ["Completed"]


def test_a_retried_flow_run_is_the_same_run(run_flow: Any) -> None:
    """The Prefect UI's retry starts a new engine for the same flow run: nothing is trained or registered again."""
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.flow_engine import run_flow as run_engine
    from prefect.states import Scheduled

    from flows.tasks.report import Report
    from flows.train_diffusion import train_diffusion

    first = run_flow()
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        client.set_flow_run_state(flow_run.id, Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(flow_run.id)
    second = run_engine(train_diffusion, flow_run=flow_run, parameters=flow_run.parameters)
    assert isinstance(second, Report)
    assert second.rows == first.rows
    tracking = connect(settings().tracking_uri)
    (run,) = tracking.search_runs([tracking.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FINISHED"
    losses = tracking.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1, 17))
    assert len(tracking.search_model_versions(f"name = '{MODEL}'")) == 1


def test_a_failure_closes_the_mlflow_run_with_its_reason(run_flow: Any) -> None:
    with pytest.raises(Exception, match="became NaN or infinite"):
        run_flow(overrides={"optimizer.learning_rate": 1e30, "optimizer.warmup_images": 0})
    client = connect(settings().tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FAILED"
    assert "became NaN" in run.data.tags["failure"]
    assert states_by_task()["train to step 8"] == ["Failed"], "what the user must change first was tried again"


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (DataError("a class is missing"), 1),
        (StoreError("503"), 3),
        (TrackingError("silent"), 3),
        (RuntimeError("crash"), 3),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(prefect_server: None, error: Exception, attempts: int) -> None:
    from prefect import flow, task

    from flows.tasks.retrying import worth_retrying

    tried = []

    @task(retries=2, retry_condition_fn=worth_retrying)
    def fails() -> None:
        tried.append(1)
        raise error

    @flow
    def tries() -> None:
        fails()

    with pytest.raises(type(error)):
        tries()
    assert len(tried) == attempts


def test_bad_requests_end_before_anything_is_written(
    run_flow: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="did you mean 'demo'"):
        run_flow(preset="demos")
    with pytest.raises(RecipeError, match="did you mean"):
        run_flow(overrides={"data.imagse": 1})
    with pytest.raises(RecipeError, match="Use 1, 2, 4"):
        run_flow(processes=3)
    with pytest.raises(DataError, match="No archive at"):
        run_flow(source="/no/such/archive.zip")
    with pytest.raises(RecipeError, match="TRAIN_DIFFUSION_INCEPTION"):
        run_flow(overrides={"evaluation.extractors": ["inception"]})
    monkeypatch.setenv("TRAIN_DIFFUSION_STORE", "/dev/null/store")
    with pytest.raises(StoreError, match="can't be written"):
        run_flow()
    monkeypatch.delenv("TRAIN_DIFFUSION_STORE")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError, match="does not answer"):
        run_flow()
    assert not (home / "store" / "datasets").exists()
    assert not (home / "runs").exists()


def test_eurosat_is_never_replaced_by_generated_patches(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.data.find.MIRRORS", ())
    monkeypatch.setattr("diffusion.data.download.MIRRORS", ())
    with pytest.raises(DataError, match="set EUROSAT_ARCHIVE"):
        find_archive("eurosat", settings())
