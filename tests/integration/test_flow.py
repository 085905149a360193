"""The whole flow on a small generated set, against Prefect's test harness and MLflow on SQLite."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import tifffile
from mlflow.exceptions import MlflowException
from PIL import Image
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import Abort
from prefect.states import Cancelled, Completed, Crashed, Running

import mlflow
from diffusion.data.sources import generated
from diffusion.data.sources.find import find_archive
from diffusion.data.sources.source import parse_options
from diffusion.errors import DataError, RecipeError, StoreError, TrackingError
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store.objects import open_store
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.promotion import champion_version
from diffusion.tracking.run import Lineage, TrackedRun
from diffusion.tracking.version_tags import tags_of
from diffusion.training.state import load_state
from flows.checks import check_free
from flows.commands import reproduce
from flows.commands import score as command
from flows.deployed import be_the_only_run
from flows.owner import this_process
from flows.tasks.ingest import find_source, ingest_archive
from tests.conftest import PATIENCE, TINY, Ingested, lay_out, tiny_recipe
from tests.ranks import fork_rank

pytestmark = pytest.mark.slow

ONE_MILESTONE = {"evaluation.every_images": TINY["data.images"]}
TOLD = {"network.label_dropout": 0.0, "evaluation.guidance": 1.0}
"""A network that is told the class of every image can't be guided."""
MODEL = f"{generated.NAME}-ddpm"


@pytest.fixture
def run_flow(prefect_server: None, home_with_mlflow: Path, archive: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the flow on the tiny recipe, on the small generated archive; its ranks are forked."""
    monkeypatch.setattr("flows.launcher._start", fork_rank)
    lay_out(home_with_mlflow, archive)

    def run(**parameters: Any) -> Any:
        from flows.train_diffusion import train_diffusion

        overrides = TINY | parameters.pop("overrides", {})
        chosen: dict[str, Any] = {
            "preset": "demo",
            "source": "generated",
            "processes": 1,
            "fid_bar": 1000.0,
        } | parameters
        return train_diffusion(**chosen, overrides=overrides)

    return run


def states_by_task(*names: str) -> dict[str, list[str]]:
    """State names of the task runs of the newest flow run, by their names, once the server has been told how these ended."""
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        of_it = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[newest.id]))
        deadline = time.monotonic() + PATIENCE
        while True:
            tasks = client.read_task_runs(task_run_filter=of_it)
            ended = [run.name for run in tasks if run.state and run.state.is_final()]
            if set(names) <= set(ended) and len(ended) == len(tasks):
                break
            assert time.monotonic() < deadline, tasks
            time.sleep(0.2)
    found: dict[str, list[str]] = {}
    for run in tasks:
        found.setdefault(run.name, []).append(run.state_name or "")
    return found


def artifacts(flow_run_id: Any) -> list[tuple[str | None, str | None]]:
    """Keys and descriptions of what a flow run shows in Prefect."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        of_it = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        return [(one.key, one.description) for one in client.read_artifacts(artifact_filter=of_it)]


def test_the_flow_trains_scores_registers_and_competes(
    run_flow: Any, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "mlflow" / "mlflow.db").unlink()  # for once it makes one
    first = run_flow(overrides=TOLD)
    assert "champion" in first.rows["model version"]
    assert first.rows["dataset"].startswith("generated-fields-and-water")
    client = connect(settings().tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1, 17))
    assert losses[-1].value < losses[0].value
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "score/fid_eurosat")] == [8, 16]
    images = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    grids = [path.split("+")[2] for path in images if "/samples+" in path and path.endswith(".png")]
    assert sorted(grids, key=int) == ["0", "8", "16"], "the noise, and a grid a milestone"
    assert client.list_artifacts(run.info.run_id, "figures")
    assert run.data.tags["dataset.name"] == "generated-fields-and-water"
    tasks = states_by_task("ingest", "train to step 8", "train to step 16")
    assert tasks["ingest"] == ["Completed"]
    assert tasks["train to step 8"] == tasks["train to step 16"] == ["Completed"]

    # Again: ingestion and reference are found, a second version competes with the first. MLflow's server goes when all is decided.
    def gone(*_: Any) -> None:
        raise MlflowException("API request failed: Connection refused")

    with monkeypatch.context() as fault:
        fault.setattr("flows.tasks.report.scores_of", gone)
        second = run_flow(fid_margin=5.0, overrides=TOLD)
    assert f"{MODEL} 2" in second.rows["model version"]
    assert "asked for: below -5" in second.rows["model version"]
    description = client.get_model_version(MODEL, "2").description
    assert "256 images on 1 CPU processes" in description
    assert "minutes at" in description
    assert states_by_task("ingest")["ingest"] == ["Cached"]
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert str(champion.version) == "1", "the same recipe gives the same model, which is not better than itself"
    assert first.rows["fid_eurosat"] == second.rows["fid_eurosat"]
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 2

    # Scored by another protocol: the champion is scored so as well, but for the guidance, and they compete. What the real images
    # look like to the extractor was damaged meanwhile: it is measured again, and not asked for by hand.
    (reference,) = (home / "store" / "references").glob("*.safetensors")
    measured = reference.read_bytes()
    reference.write_bytes(measured[:-1] + bytes([measured[-1] ^ 1]))
    third = run_flow(overrides=ONE_MILESTONE | {"evaluation.samples": 90, "network.width": 24})
    assert "Against version 1, scored again as this one was: " in third.rows["model version"]
    assert " over 90 samples" in third.rows["model version"]
    assert reference.read_bytes() == measured

    # By a command, with other weights than those that were chosen; and not by a checkpoint that took the place of its own.
    def score(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["score", *words])
        code = command.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    code, said = score(f"{MODEL}/3", "--set", "weights=raw", "--processes", "1")
    assert (code, f"{MODEL}/3: model after" in said) == (0, True), said
    client.set_model_version_tag(MODEL, "3", "checkpoint.digest", "0" * 64)
    code, said = score(f"{MODEL}/3")
    assert (code, f"is not the one that version 3 of {MODEL} was made of" in said) == (1, True), said


def test_images_of_one_s_own_are_trained_on(run_flow: Any, tmp_path: Path) -> None:
    """Two classes of GeoTIFF-like files of four bands, oblong; then a flat folder of grey PNGs: no classes, no EuroSAT."""
    rng = np.random.default_rng(0)
    for name in ("ponds", "roofs"):
        (tmp_path / "parcels" / name).mkdir(parents=True)
        for number in range(10):
            levels = rng.integers(100, 3000, (1, 1, 4)) + rng.integers(0, 900, (20, 24, 4))
            file = tmp_path / "parcels" / name / f"{number}.tif"
            tifffile.imwrite(file, levels.astype(np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r'24 x 20 pixels.*"fit": "crop"'):
        run_flow(source=str(tmp_path / "parcels"))
    bands = ["B02", "B03", "B04", "B08"]
    options = {"size": 16, "fit": "crop", "bands": bands, "licence": "CC0"}
    report = run_flow(source=str(tmp_path / "parcels"), source_options=options, overrides=ONE_MILESTONE)
    digest = report.rows["dataset"].split()[1].rstrip(",")
    assert f"fid_own-{digest[:8]}" in report.rows
    assert report.rows["model version"].startswith("parcels-ddpm 1")
    called = parse_options(options | {"name": "fields", "licence": "CC BY 4.0"})
    found = find_source(str(tmp_path / "parcels"), called)
    manifest = ingest_archive(found, settings().store_uri)
    assert (manifest.digest, manifest.source, manifest.licence) == (found.digest, "fields", "CC BY 4.0"), "as said now"
    assert digest.startswith(manifest.digest[:16])
    client = connect(settings().tracking_uri)
    version = client.get_model_version("parcels-ddpm", "1")
    for said in ("B02, B03, B04, B08", "uint16", "CC0", "ponds"):
        assert said in version.description, version.description
    model = mlflow.pyfunc.load_model("models:/parcels-ddpm/1")
    drawn = model.predict([], params={"n": 2, "label": "roofs", "steps": 2})
    assert (np.asarray(drawn).shape, np.asarray(drawn).dtype) == ((2, 16, 16, 4), np.uint16)
    (tiff,) = model.predict([], params={"n": 1, "steps": 2, "format": "tiff"})
    with tifffile.TiffFile(io.BytesIO(base64.b64decode(tiff))) as opened:
        assert opened.asarray().shape == (16, 16, 4)
        assert json.loads(opened.pages.first.description)["bands"] == bands
    (npy,) = model.predict([], params={"n": 1, "steps": 2, "format": "npy"})
    by_band = np.load(io.BytesIO(base64.b64decode(npy)))
    assert (by_band.shape, by_band.dtype.names) == ((16, 16), tuple(bands))
    (png,) = model.predict([], params={"n": 1, "steps": 2, "format": "png"})
    assert Image.open(io.BytesIO(base64.b64decode(png))).mode == "RGB"

    (tmp_path / "grey").mkdir()
    for number in range(20):
        levels = rng.integers(0, 200) + rng.integers(0, 50, (16, 16))
        Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "grey" / f"{number}.png")
    report = run_flow(source=str(tmp_path / "grey"), overrides=ONE_MILESTONE)
    assert report.rows["model version"].startswith("grey-ddpm 1")
    (run,) = client.search_runs(
        [client.get_experiment_by_name("train-diffusion").experiment_id], "tags.`dataset.name` = 'grey'"
    )
    assert not [name for name in run.data.metrics if "class" in name], "no figure of classes where there are none"
    drawn = mlflow.pyfunc.load_model("models:/grey-ddpm/1").predict([], params={"n": 2, "steps": 2})
    assert np.asarray(drawn).shape == (2, 16, 16, 1)


def test_a_retried_flow_run_is_the_same_run(run_flow: Any) -> None:
    """The Prefect UI's retry starts a new engine for the same flow run: nothing is trained or registered again."""
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.flow_engine import run_flow as run_engine
    from prefect.states import Scheduled

    from flows.progress import _pages
    from flows.tasks.report import Report
    from flows.train_diffusion import train_diffusion

    first = run_flow(overrides=ONE_MILESTONE)
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
        client.set_flow_run_state(flow_run.id, Scheduled(name="AwaitingRetry"), force=True)
        flow_run = client.read_flow_run(flow_run.id)
    assert artifacts(flow_run.id) == [("report", "Version 1 became champion.")], "one page, which ends as the report"
    _pages.clear()  # as in a process of its own
    store = open_store(settings().store_uri)
    (grid,) = [name for name in store.names("runs/") if name.endswith("grid.png")]
    store.delete(grid)  # by clean-up, which keeps figures: they are made again, and are the same
    second = run_engine(train_diffusion, flow_run=flow_run, parameters=flow_run.parameters)
    assert artifacts(flow_run.id) == [("report", "Version 1 became champion.")]
    assert isinstance(second, Report)
    assert second.rows == first.rows
    tracking = connect(settings().tracking_uri)
    (run,) = tracking.search_runs([tracking.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FINISHED"
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(flow_run.id).name == flow_run.name == run.info.run_name, (
            "one name for one run, for life"
        )
    assert re.fullmatch(r"[0-9]{4}-[0-9]{6}-demo-seed0", flow_run.name)
    losses = tracking.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in losses] == list(range(1, 17))
    assert len(tracking.search_model_versions(f"name = '{MODEL}'")) == 1


def test_going_on_from_the_champion_is_as_if_it_had_never_stopped(run_flow: Any, home: Path) -> None:
    # With a constant rate: one that falls to the end of the budget falls to another end when there is more of it.
    constant = {"optimizer.decay": "constant"} | ONE_MILESTONE
    run_flow(overrides=constant)
    client = connect(settings().tracking_uri)
    client.set_registered_model_alias(MODEL, "champion", "1")
    continued = run_flow(start_from="champion", overrides=constant | {"data.images": 128})
    assert continued.rows["steps"] == "24 of 16 images"
    experiment = client.get_experiment_by_name("train-diffusion").experiment_id
    (second, first) = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    assert json.loads(second.data.tags["recipe.start"])["run"] == first.data.tags["train_diffusion.run"]
    assert second.info.run_name.endswith("-demo-seed0-from-champion")
    tags = [tags_of(client.get_model_version(MODEL, number)) for number in ("1", "2")]
    assert tags[1]["start.run"] == tags[0]["run"]
    assert tags[0]["continued_by.2"] == tags[1]["run"]
    losses = [metric.step for metric in client.get_metric_history(second.info.run_id, "train/loss")]
    assert losses == list(range(17, 25))

    run_flow(overrides=constant | {"data.images": 384})
    (whole, *_) = client.search_runs([experiment], order_by=["attributes.start_time DESC"])
    store = open_store(settings().store_uri)
    at_end = [load_state(store, run.data.tags["train_diffusion.run"], 24).sha256 for run in (second, whole)]
    for name in ("model.safetensors", "ema-500000.safetensors", "optimizer.safetensors"):
        assert at_end[0][name] == at_end[1][name]

    with pytest.raises(RecipeError, match=r"network is .* here"):
        run_flow(start_from="champion", overrides={"network.width": 8})


def test_a_version_is_reproduced_bit_for_bit(
    run_flow: Any, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRAIN_DIFFUSION_COMMIT", "c" * 40)
    run_flow(overrides=ONE_MILESTONE)

    words = [sys.executable, "-m", "flows.commands.reproduce", "--model", MODEL, "--version", "1", "--processes", "2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if line[:11].strip()}
    assert {said[what] for what in ("code", "dataset", "recipe", "weights", "checkpoint")} == {"same"}
    monkeypatch.setenv("TRAIN_DIFFUSION_COMMIT", "d" * 40)
    for file in (home / "store" / "datasets").rglob(
        "manifest.json"
    ):  # the images are still there, to be ingested again
        file.unlink()
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*words[2:5], "--version", "1"])  # in this process, as main says
    assert reproduce.main() == 0
    again = capsys.readouterr().out
    assert "code  DIFFERENT" in again
    assert "training" in again, "what an earlier reproduction had made was taken for a new one"
    assert not list(settings().runs.glob("reproduce-*"))
    monkeypatch.setattr(sys, "argv", [*words[2:5], "--version", "7"])
    assert reproduce.main() == 1
    assert "error: MLflow has no model version" in capsys.readouterr().err
    for gpus, reason in ((0, "same number of processes"), (1, "On a GPU")):
        monkeypatch.setattr(reproduce, "gpus", lambda gpus=gpus: gpus)
        assert reason in reproduce._may_differ(load_recipe("eurosat"), settings())


def test_what_is_unchanged_is_skipped_and_a_night_has_its_date_for_a_seed(
    run_flow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scheduled for yesterday, it begins today; retried, it is still yesterday's. The same again is left out."""
    from prefect.flow_engine import run_flow as run_engine
    from prefect.states import Scheduled

    from flows.train_diffusion import train_diffusion

    monkeypatch.setenv("TRAIN_DIFFUSION_COMMIT", "c" * 40)
    yesterday = datetime.now(UTC) - timedelta(days=1)
    parameters = {
        "preset": "demo",
        "source": "generated",
        "processes": 1,
        "overrides": TINY | ONE_MILESTONE,
    }

    def night(due: datetime, parameters: dict[str, Any], times: int) -> list[str | None]:
        """What comes of it, begun so many times."""
        found = []
        with get_client(sync_client=True) as client:
            made = client.create_flow_run(
                train_diffusion,
                parameters=parameters,
                state=Scheduled(scheduled_time=due),
                tags=["auto-scheduled"],
            )
            for _ in range(times):
                run_engine(train_diffusion, flow_run=client.read_flow_run(made.id), parameters=parameters)
                found.append(client.read_flow_run(made.id).state_name)
                client.set_flow_run_state(made.id, Scheduled(name="AwaitingRetry"), force=True)
        return found

    assert night(yesterday, parameters, 2) + night(yesterday, parameters, 2) == ["Completed", *["Skipped"] * 3]
    tracking = connect(settings().tracking_uri)
    (run,) = tracking.search_runs([tracking.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.data.params["seed"] == f"{yesterday:%Y%m%d}"
    # Where nights are for new data, they have one seed: another recipe is a reason to train, another date is none.
    parameters |= {"nights": "new data", "overrides": TINY | ONE_MILESTONE | {"data.images": 128}}
    assert night(yesterday, parameters, 1) + night(datetime.now(UTC), parameters, 1) == ["Completed", "Skipped"]
    newest, _ = tracking.search_runs([run.info.experiment_id])
    assert newest.data.params["seed"] == "0"
    with pytest.raises(RecipeError, match="do not go together"):
        night(yesterday, parameters | {"start_from": "champion"}, 1)


@flow
def deployed(home: str) -> None:
    """What a deployed run does first."""
    be_the_only_run(Path(home), "1129-0200-nightly", str(runtime.flow_run.id), seconds=0)


def test_of_one_run_that_was_started_twice_the_first_goes_on_and_says_how_it_ends(
    prefect_server: None, tmp_path: Path
) -> None:
    """Retried while Prefect's worker had yet to report the crash: it is reported again, of the retry, and retried again."""
    from prefect.flow_engine import run_flow as run_engine

    hold = "import sys; from pathlib import Path; from flows.deployed import be_the_only_run; "
    hold += "be_the_only_run(Path(sys.argv[1]), 'x', sys.argv[2]); print('held', flush=True); sys.stdin.read()"
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(deployed, parameters={"home": str(tmp_path)}, state=Running())
        command = [sys.executable, "-c", hold, str(tmp_path), str(run.id)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            assert first.stdout is not None
            first.stdout.readline()
            with pytest.raises(Abort):
                run_engine(deployed, flow_run=client.read_flow_run(run.id), parameters={"home": str(tmp_path)})
            first.kill()
        assert client.read_flow_run(run.id).state_name == "Running"


def test_the_run_of_a_machine_that_is_lost_with_its_folder_ends_when_nobody_has_heard_of_it_for_long(
    prefect_server: None, home_with_mlflow: Path, ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.endings import close_abandoned
    from flows.train_diffusion import train_diffusion

    tracking, experiment = open_tracking(settings())
    elsewhere = json.dumps(json.loads(this_process()) | {"host": "a machine that is lost"})
    with get_client(sync_client=True) as client:
        flow_run = client.create_flow_run(train_diffusion, state=Running())
        ids = {"lost": str(flow_run.id), "of-another-server": str(uuid4())}
        runs = {}
        for key, flow_run_id in ids.items():
            lineage = Lineage(key, key, "c" * 40, flow_run_id, "", elsewhere)
            dataset = ingested.manifest
            run = TrackedRun.open(tracking, experiment, lineage, tiny_recipe(), dataset, ingested.store.uri)
            runs[key] = run.run_id
            two_hours_ago = int(1000 * (time.time() - 7200))
            tracking.log_metric(run.run_id, "system/cpu_utilization_percentage", 50.0, timestamp=two_hours_ago)

        def status(key: str = "lost") -> str:
            close_abandoned(tracking, experiment, "another", tmp_path)
            return str(tracking.get_run(runs[key]).info.status)

        client.set_flow_run_state(flow_run.id, Crashed(), force=True)
        assert status() == "RUNNING", "it has begun just now"
        monkeypatch.setattr("flows.endings.LOST_SECONDS", 0.0)
        client.set_flow_run_state(flow_run.id, Completed(), force=True)
        assert status() == "RUNNING", "its own machine has noted how it ended"
        client.set_flow_run_state(flow_run.id, Crashed(), force=True)
        assert status() == "FAILED"
        assert status("of-another-server") == "RUNNING"


@flow
def somebody_else_s() -> None:
    """On the same server."""


def test_no_run_of_another_flow_is_crashed_whatever_mlflow_says(prefect_server: None) -> None:
    from flows.endings import crash_flow_run
    from flows.train_diffusion import train_diffusion

    with get_client(sync_client=True) as client:
        for one, state in ((somebody_else_s, "Running"), (train_diffusion, "Crashed")):
            run = client.create_flow_run(one, state=Running())
            crash_flow_run(str(run.id), "as a tag says")
            assert client.read_flow_run(run.id).state_name == state


@pytest.mark.parametrize("end", [Crashed, Cancelled])
def test_tasks_of_a_run_that_was_killed_end_as_it_did(prefect_server: None, end: Any) -> None:
    from flows.endings import close_tasks_of_ended_runs
    from flows.tasks.train import train
    from flows.train_diffusion import train_diffusion

    with get_client(sync_client=True) as client:
        ours = [client.create_flow_run(train_diffusion, state=Running()) for _ in range(2)]
        runs = [*ours, client.create_flow_run(somebody_else_s, state=Running())]
        tasks = [client.create_task_run(train, run.id, dynamic_key="0", state=Running()) for run in runs]
        for dead in (runs[0], runs[2]):
            client.set_flow_run_state(dead.id, end(message="The worker that ran it has died."), force=True)
        close_tasks_of_ended_runs()
        states = [client.read_task_run(task.id).state for task in tasks]
    assert states[0] is not None
    assert (states[0].name, states[0].message) == (end().name, "The worker that ran it has died.")
    assert [state.name for state in states[1:] if state] == ["Running"] * 2, "of a run that lives, and of others' flows"


def test_a_failure_closes_the_mlflow_run_with_its_reason(run_flow: Any, home: Path) -> None:
    with pytest.raises(Exception, match="became NaN or infinite"):
        run_flow(overrides={"optimizer.learning_rate": 1e30, "optimizer.warmup_images": 0})
    client = connect(settings().tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FAILED"
    assert "became NaN" in run.data.tags["failure"]
    assert states_by_task("train to step 8")["train to step 8"] == ["Failed"], (
        "what the user must change first was tried again"
    )

    # The shards are gone, the cache entry is not: they are made again.
    for file in (home / "store" / "datasets").rglob("manifest.json"):
        file.unlink()
    with pytest.raises(Exception, match="became NaN or infinite"):
        run_flow(overrides={"optimizer.learning_rate": 1e30, "optimizer.warmup_images": 0})
    assert states_by_task("ingest")["ingest"] == ["Completed"]


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
    with pytest.raises(RecipeError, match="Use 1, 2 processes"):
        run_flow(processes=3)
    with pytest.raises(DataError, match="There are no images at"):
        run_flow(source="/no/such/archive.zip")
    with pytest.raises(RecipeError, match="TRAIN_DIFFUSION_INCEPTION"):
        run_flow(overrides={"evaluation.extractors": ["inception"]})
    with monkeypatch.context() as patch:
        patch.setenv("TRAIN_DIFFUSION_INCEPTION", "/x.pt")
        patch.setenv("TRAIN_DIFFUSION_INCEPTION_SHA256", "abc")
        with pytest.raises(RecipeError, match="not the sha256"):
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


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small disk is a mount, which root may make")
def test_a_run_does_not_begin_on_a_disk_that_is_all_but_full(tmp_path: Path) -> None:
    check_free(tmp_path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(tmp_path)], check=True)
    try:
        with pytest.raises(StoreError, match=r"0\.3 GB are free on the disk of .*; a run wants 1 GB"):
            check_free(tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_eurosat_is_never_replaced_by_generated_patches(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.data.sources.find.MIRRORS", ())
    monkeypatch.setattr("diffusion.data.sources.download.MIRRORS", ())
    with pytest.raises(DataError, match="set EUROSAT_ARCHIVE"):
        find_archive("eurosat", settings())
