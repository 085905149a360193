"""Tracking against a real MLflow server: each point once, models that load where this project is not importable."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mlflow
from diffusion.data.sealed import seal
from diffusion.denoiser import build_network
from diffusion.errors import TrackingError
from diffusion.evaluation import reference
from diffusion.evaluation.comparison import Evidence
from diffusion.evaluation.pictures import class_grid, png
from diffusion.evaluation.scores import Scores
from diffusion.evaluation.statistics import Moments
from diffusion.presentation.legend import LEGEND_TITLE, legend
from diffusion.presentation.markdown import MOST, fit_description
from diffusion.presentation.plots import loss_by_noise_level
from diffusion.recipe import Recipe, Start, flatten
from diffusion.settings import settings
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import NOTE, open_experiment
from diffusion.tracking.gates import Margins
from diffusion.tracking.pages import VIEW_TAG
from diffusion.tracking.promotion import champion_version, decide
from diffusion.tracking.registry import Candidate, publish
from diffusion.tracking.run import Lineage, TrackedRun, finished_run, recorded_start, unfinished_run
from diffusion.tracking.scores_tag import scores_of
from diffusion.tracking.sender import MetricsSender
from diffusion.tracking.system import SystemMetrics
from diffusion.tracking.version_tags import tags_of
from diffusion.training.checkpoint import Checkpoint, write_checkpoint
from diffusion.training.journal import COMMITTED, JOURNAL, TIMING, Journal
from diffusion.training.state import FORMAT_VERSION, CheckpointState
from mlflow import MlflowClient
from tests.conftest import BIN, PATIENCE, Ingested, Server, tiny_recipe
from tests.packages import with_only
from tests.scores import made

MODEL = "generated-fields-and-water-ddpm"
LINEAGE = Lineage(
    key="", name="", commit="c" * 40, flow_run_id="f1", flow_run_url="http://127.0.0.1/flow-run/f1", owner="{}"
)


@pytest.fixture
def client(mlflow_server: Server) -> MlflowClient:
    return connect(mlflow_server.url)


@pytest.fixture
def run(client: MlflowClient, ingested: Ingested, request: pytest.FixtureRequest) -> TrackedRun:
    return open_run(client, ingested, request.node.name)


def open_run(client: MlflowClient, ingested: Ingested, key: str, commit: str = "c" * 40) -> TrackedRun:
    lineage = replace(LINEAGE, key=key, name=f"run {key}", commit=commit)
    return TrackedRun.open(
        client,
        open_experiment(client, None),
        lineage,
        tiny_recipe(),
        ingested.manifest,
        ingested.store.uri,
    )


def write_records(folder: Path, steps: range, committed: int) -> None:
    journal, timing = Journal(folder / JOURNAL), Journal(folder / TIMING)
    for step in steps:
        metrics = {"loss": 1 / step, "learning_rate": 0.1, "gradient_norm": 2.0, "loss_by_log_snr": [None] * 9 + [1.0]}
        journal.append({"step": step, "kind": "metrics", **metrics})
        timing.append({"step": step, "images_per_second": 9.5, "data_wait_share": 0.1, "peak_memory_bytes": 2**20})
    (folder / COMMITTED).write_text(json.dumps({"step": committed}))


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in run.client.get_metric_history(run.run_id, key)]


def test_a_run_holds_recipe_lineage_and_dataset(run: TrackedRun, ingested: Ingested) -> None:
    logged = run.client.get_run(run.run_id)
    assert logged.data.params["network.width"] == "16"
    assert logged.data.params == flatten(tiny_recipe())
    recipe = mlflow.artifacts.load_text(f"runs:/{run.run_id}/recipe.json")
    assert Recipe.model_validate_json(recipe) == tiny_recipe()
    tags = logged.data.tags
    assert tags["dataset.digest"] == ingested.manifest.digest
    assert tags["recipe.digest"] == tiny_recipe().digest
    assert (tags["git.commit"], tags["prefect.flow_run_id"]) == ("c" * 40, "f1")
    (dataset,) = logged.inputs.dataset_inputs
    assert dataset.dataset.name == "generated-fields-and-water"
    assert dataset.dataset.digest == ingested.manifest.digest[:36]
    (images,) = json.loads(json.loads(dataset.dataset.schema)["mlflow_tensorspec"]["features"])
    assert images["tensor-spec"] == {"dtype": "uint8", "shape": [-1, 64, 64, 3]}


def test_the_experiments_legend_follows_the_code_and_never_replaces_what_somebody_wrote(client: MlflowClient) -> None:
    experiment_id = open_experiment(client, None)

    def note_after(text: str) -> str:
        client.set_experiment_tag(experiment_id, NOTE, text)
        assert open_experiment(client, None) == experiment_id
        return str(client.get_experiment(experiment_id).tags[NOTE])

    assert note_after("Ours. Ask Ada.") == "Ours. Ask Ada."
    assert note_after(f"{LEGEND_TITLE}\n\nfid: of an older version") == legend()


def test_the_table_of_runs_has_a_column_for_each_figure_that_was_measured(run: TrackedRun) -> None:
    def columns() -> list[str]:
        view = json.loads(run.client.get_experiment(run.experiment_id).tags[VIEW_TAG])
        return list(view["selectedColumns"])

    assert not [column for column in columns() if column.startswith("metrics")]
    picture = png(class_grid(np.zeros((8, 8, 8, 3), np.uint8), [""]))
    run.log_scores(made(), picture, picture, [made()])
    shown = [
        "score/fid_eurosat",
        "score_detail/fid_error_eurosat",
        "score/bits_per_dim",
        "score_detail/bits_per_dim_error",
    ]
    assert [column for column in columns() if column.startswith("metrics")] == [f"metrics.`{name}`" for name in shown]
    logged = run.client.get_run(run.run_id).data.metrics
    assert set(shown) <= set(logged), "each column is of a metric that is there"
    before = columns()
    open_experiment(run.client, None)
    assert columns() == before, "another run's start took them away"
    run.client.set_experiment_tag(run.experiment_id, VIEW_TAG, "torn {")
    open_experiment(run.client, None)
    assert columns()[0] == "tags.`promotion`"


def test_an_experiment_that_was_deleted_or_whose_artifacts_lie_elsewhere_is_said(
    home_with_mlflow: Path, tmp_path: Path
) -> None:
    client, artifacts = connect(settings().tracking_uri), tmp_path / "elsewhere" / "artifacts"
    number = open_experiment(client, artifacts)
    client.delete_experiment(number)

    def refused(match: str) -> list[list[str]]:
        """What it says that one may type."""
        with pytest.raises(TrackingError, match=match) as said:
            open_experiment(client, None)
        return [command.split() for command in re.findall(r"\((mlflow [^)]*)\)", str(said.value))]

    restore, rename = refused("was deleted. Bring it back")
    type_it(restore)
    assert open_experiment(client, artifacts) == number
    artifacts.rmdir()
    assert open_experiment(client, None) == number, "MLflow makes a folder in one that is there"
    artifacts.parent.rmdir()
    assert refused(r"keeps its artifacts in .*, which this machine does not have") == [rename]
    type_it(rename)
    assert open_experiment(client, None) != number


def type_it(command: list[str]) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": settings().tracking_uri}
    subprocess.run([BIN / command[0], *command[1:]], env=environment, check=True, capture_output=True)


def test_a_retry_finds_the_run_of_its_flow_run(
    run: TrackedRun, ingested: Ingested, request: pytest.FixtureRequest
) -> None:
    run.close("FAILED", "killed")
    again = open_run(run.client, ingested, request.node.name)
    assert again.run_id == run.run_id
    assert run.client.get_run(run.run_id).info.status == "RUNNING"
    assert open_run(run.client, ingested, "another").run_id != run.run_id
    assert again.earlier_commits == ""
    mended = [open_run(run.client, ingested, request.node.name, commit) for commit in ("d" * 40, "e" * 40, "e" * 40)]
    assert [one.earlier_commits for one in mended] == ["c" * 40, f"{'c' * 40},{'d' * 40}", f"{'c' * 40},{'d' * 40}"]
    # And of code that is changed while it runs.
    assert not mended[-1].goes_on_by("e" * 40)
    assert mended[-1].goes_on_by("f" * 40)
    tags = run.client.get_run(run.run_id).data.tags
    assert tags["git.commit"] == tags["mlflow.source.git.commit"] == mended[-1].commit == "f" * 40
    assert tags["git.commit.earlier"] == mended[-1].earlier_commits == ",".join(letter * 40 for letter in "cde")


def test_points_arrive_once_however_often_they_are_sent(run: TrackedRun, tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 41), committed=30)
    MetricsSender(run, tmp_path).send_committed()
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 31)]
    write_records(tmp_path, range(41, 51), committed=50)
    MetricsSender(run, tmp_path).send_committed()  # one that knows nothing of what was sent
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 51)]
    assert history(run, "speed/peak_memory_mib") == [(step, 1.0) for step in range(1, 51)]


def test_the_sender_follows_in_the_background_and_survives_an_outage(run: TrackedRun, tmp_path: Path) -> None:
    class Unplugged(TrackedRun):
        failures = 0

        def log_metrics(self, *told: Any, **more: Any) -> None:
            if self.failures < 2:
                type(self).failures += 1
                raise ConnectionError("unplugged")
            super().log_metrics(*told, **more)

    unplugged = Unplugged(run.client, run.run_id, run.experiment_id, run.started, run.name)
    write_records(tmp_path, range(1, 11), committed=10)
    with MetricsSender(unplugged, tmp_path) as sender:
        deadline = time.monotonic() + PATIENCE
        while Unplugged.failures < 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        sender.flush()
    assert Unplugged.failures == 2
    assert history(run, "train/loss") == [(step, 1 / step) for step in range(1, 11)]


def scores(step: int = 2, fid: float = 10.0, samples: int = 80, **fields: Any) -> Scores:
    return made(
        step=step, images_seen=32, fid=fid, fid_error=0.5, samples=samples, bits=4.0, weights="ema-500000", **fields
    )


def grid() -> bytes:
    return png(class_grid(np.zeros((20, 16, 16, 3), np.uint8), [f"class {row}" for row in range(10)], at_least=16))


def test_scores_and_grids_become_series_and_a_repetition_changes_nothing(run: TrackedRun) -> None:
    course = [scores(8, 20.0), scores(16, 12.5)]
    for count in (1, 2, 2):
        run.log_scores(course[count - 1], grid(), grid(), course[:count])
    assert history(run, "score/fid_eurosat") == [(8, 20.0), (16, 12.5)]
    assert history(run, "score/bits_per_dim") == [(8, 4.0), (16, 4.0)]
    figures = [item.path for item in run.client.list_artifacts(run.run_id, "figures")]
    by_step = [f"figures/{name}-{step:09d}.png" for name in ("bound", "classes", "closest") for step in (8, 16)]
    assert sorted(figures) == [*by_step, "figures/fid_over_training.png"]
    sections = {key.partition("/")[0] for key in run.client.get_run(run.run_id).data.metrics}
    assert sections == {"score", "score_detail"}
    table = run.client.load_table(run.experiment_id, "scores/000000016.json", [run.run_id])
    assert len(table) == len(set(table["figure"])), "a repetition added its rows again"
    fid = table[table["figure"] == "fid_eurosat (n = 80)"].iloc[0]
    assert (fid["value"], fid["real images"]) == (12.5, 0.4)
    images = [item.path for item in run.client.list_artifacts(run.run_id, "images")]
    assert len([path for path in images if "/samples+step+" in path and path.endswith(".png")]) == 2
    assert run.client.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_an_evaluation_that_was_made_again_is_what_the_run_shows(run: TrackedRun) -> None:
    """Also where its figure is lower, which MLflow would take for the older of two points of one time."""
    for fid in (12.0, 10.0, 10.0):
        made_now = scores(fid=fid)
        run.log_scores(made_now, grid(), grid(), [made_now])
        assert run.client.get_run(run.run_id).data.metrics["score/fid_eurosat"] == fid
    assert [value for _, value in history(run, "score/fid_eurosat")] == [12.0, 10.0]
    for kid in (0.05, 0.02):  # by another protocol, which left FID as it was
        made_now = scores(fid=10.0, kid=kid)
        run.log_scores(made_now, grid(), grid(), [made_now])
        assert run.client.get_run(run.run_id).data.metrics["score/kid_eurosat"] == kid


def test_system_metrics_outlive_an_absence_of_mlflow(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.tracking.system.SAMPLES", 1)
    kept = run.log_metrics
    refused: list[tuple[str, float, int]] = []

    def log_metrics(rows: Any, *args: Any, **kwargs: Any) -> None:
        if not refused:
            refused.extend(rows)
            raise ConnectionError("away")
        kept(rows, *args, **kwargs)

    monkeypatch.setattr(run, "log_metrics", log_metrics)
    with SystemMetrics(run, sample_seconds=2.0):
        deadline = time.monotonic() + PATIENCE
        while len(points := history(run, "system/cpu_utilization_percentage")) < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
    assert len(points) >= 3
    assert len({step for step, _ in points}) == len(points)
    (first,) = [step for name, _, step in refused if name == "system/cpu_utilization_percentage"]
    assert points[0][0] == first, "the point that MLflow did not take at first is missing"


def test_the_figure_of_the_loss_by_noise_level_is_logged(run: TrackedRun, tmp_path: Path) -> None:
    write_records(tmp_path, range(1, 13), committed=12)
    rows = [json.loads(line) for line in (tmp_path / JOURNAL).read_text().splitlines()]
    run.log_figure(loss_by_noise_level(rows), "figures/loss_by_noise_level.png")
    assert [item.path for item in run.client.list_artifacts(run.run_id, "figures")] == [
        "figures/loss_by_noise_level.png"
    ]


def test_a_run_that_did_not_finish_is_found_by_the_next_of_its_recipe_data_and_code(
    client: MlflowClient, ingested: Ingested
) -> None:
    recipe, other = tiny_recipe(seed=77), tiny_recipe(seed=78)
    experiment = open_experiment(client, None)

    def look(commit: str = "c" * 40, of: Recipe = recipe) -> str | None:
        return unfinished_run(client, experiment, of, ingested.manifest, commit)

    def begin(key: str) -> TrackedRun:
        lineage = replace(LINEAGE, key=key, name=key)
        return TrackedRun.open(
            client, open_experiment(client, None), lineage, recipe, ingested.manifest, ingested.store.uri
        )

    assert look() is None
    first = begin("first")
    assert look() is None, "it is still running"
    first.close("FAILED", "killed")
    assert look() == "first"
    assert look(of=other) is None
    assert look(commit="d" * 40) is None
    assert look(commit="unknown") is None
    assert look(commit="c" * 40 + "-dirty") is None
    begin("first").close("FINISHED")
    assert look() is None
    done = partial(finished_run, client, experiment, recipe, ingested.manifest)
    assert done("c" * 40) == "first"
    again = begin("first")
    again.goes_on_by("e" * 40)
    again.close("FINISHED")
    assert done("c" * 40) is None
    assert done("e" * 40) is None, "a part of it was made by other code: a night by this one is no repetition"
    time.sleep(0.01)
    begin("second").close("KILLED")
    assert look() == "second"


def evidence_of(fid: float, samples: int) -> Evidence:
    """Samples that lie as far from `write_reference`'s images as that FID says."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((samples, 4)) + np.array([fid**0.5, 0, 0, 0])
    return Evidence(features.astype(np.float32), rng.random(samples) < 0.05, 4 + rng.standard_normal(16), None)


def write_reference(store: FolderStore, dataset: str) -> None:
    features = np.random.default_rng(1).standard_normal((5000, 4))
    train = Moments.of(features)
    few, labels = features[:10].astype(np.float32), np.zeros(10, np.int64)
    reference.write_reference(
        store, layout.reference(dataset, "eurosat", "e", 16), reference.Reference(train, few, labels, few)
    )


def make_version(run: TrackedRun, ingested: Ingested, store: FolderStore, name: str, **fields: Any) -> str:
    """Publish an untrained model: what it says is another matter."""
    expected, dataset = fields.pop("model", MODEL), fields.pop("dataset", ingested.manifest)
    recipe = tiny_recipe(seed=fields.pop("seed", 0), data__image_size=fields.pop("image_size", 16))
    network = build_network(recipe, dataset.images)
    torch.manual_seed(recipe.seed)
    for parameter in network.parameters():  # wake the zero-initialised layers
        torch.nn.init.normal_(parameter, std=0.1)
    weights = network.state_dict()
    state = CheckpointState(
        format_version=FORMAT_VERSION,
        run=name,
        step=2,
        images_seen=32,
        dataset=dataset.digest,
        recipe=recipe,
        sha256={},
    )
    state = write_checkpoint(
        store, state, Checkpoint(weights, {"ema-500000": weights}, {"x": weights["conv_in.bias"]}, b"")
    )
    tags = {"git.commit": "c" * 40}
    evidence = evidence_of(fields.get("fid", 10.0), fields.get("samples", 80)).to_bytes()
    store.write(layout.evidence(name, 2), evidence)
    made = scores(checkpoint=state.digest, evidence_sha256=hashlib.sha256(evidence).hexdigest(), **fields)
    store.write(layout.scores(name, 2), seal(made))
    pictures = {"grid": grid(), "closest": grid()}
    model, version = publish(run, store, Candidate(state, made, dataset, pictures, tags, ""))
    assert model == expected
    return version


def test_where_a_flow_run_started_is_known_to_its_retry_also_when_another_has_gone_on_with_it(
    client: MlflowClient, ingested: Ingested
) -> None:
    experiment_id = open_experiment(client, None)
    start = Start(run="champions", step=16, digest="d" * 64)
    recipe = tiny_recipe().continued(start, tiny_recipe())
    assert recorded_start(client, experiment_id, "flow-a") == (False, None)
    for flow_run in ("flow-a", "flow-b"):  # b goes on with what a has begun
        lineage = replace(LINEAGE, key="demo-seed0-flow-a", name=flow_run, flow_run_id=flow_run)
        TrackedRun.open(client, experiment_id, lineage, recipe, ingested.manifest, ingested.store.uri)
        assert recorded_start(client, experiment_id, flow_run) == (True, start)
    assert recorded_start(client, experiment_id, "flow-a") == (True, start)
    assert recorded_start(client, experiment_id, "flow-c") == (False, None)


@pytest.mark.slow
def test_a_card_of_any_length_is_kept(mlflow_server: Server) -> None:
    """PostgreSQL refuses what is longer than its columns."""
    client = connect(mlflow_server.url)
    client.create_registered_model("long")
    model = client.create_logged_model(client.create_experiment("long"))
    version = client.create_model_version(
        "long",
        f"models:/{model.model_id}",
        model_id=model.model_id,
        description=fit_description("# Long\n\n" + "x" * 9000),
    )
    client.update_model_version(
        "long", version.version, fit_description(f"{version.description}\n## Decision\n\n{'y' * 999}")
    )
    assert len(client.get_model_version("long", version.version).description) == MOST


def test_what_was_decided_of_a_model_that_was_deleted_is_not_said_of_the_next_of_its_number(
    client: MlflowClient, ingested: Ingested, tmp_path: Path
) -> None:
    """Its log stays in the store, and numbers begin again at 1; so they do where MLflow moves."""
    store, dataset = FolderStore(tmp_path / "store"), ingested.manifest.model_copy(update={"source": "Deleted"})
    write_reference(store, dataset.digest)
    for name in ("before", "after"):
        of = open_run(client, ingested, f"deleted-{name}")
        version = make_version(of, ingested, store, name, dataset=dataset, model="deleted-ddpm")
        assert version == "1"
        assert decide(client, store, "deleted-ddpm", version, Margins(first=100.0)).alias == "champion"
        champion = champion_version(client, "deleted-ddpm")
        assert champion is not None
        assert champion.run_id == of.run_id
        client.copy_model_version(f"models:/deleted-ddpm/{version}", "a-copy")
        again = make_version(of, ingested, store, name, fid=12.0, dataset=dataset, model="deleted-ddpm")
        assert again == version
        told = scores_of(client.get_model_version("deleted-ddpm", version), store)
        assert told is not None
        assert told.require("fid").value == 12.0, "it follows an evaluation that was made again"
        client.delete_registered_model("deleted-ddpm")
        client.delete_registered_model("a-copy")


@pytest.mark.slow
def test_versions_compete_and_the_champion_samples_where_the_project_is_not_importable(
    run: TrackedRun, ingested: Ingested, tmp_path: Path, mlflow_server: Server
) -> None:
    client, store = run.client, FolderStore(tmp_path / "store")
    assert champion_version(client, MODEL) is None
    write_reference(store, ingested.manifest.digest)
    early = make_version(
        run, ingested, store, "early", seed=40, image_size=32
    )  # before there is a champion of any size
    first = make_version(run, ingested, store, "a", fid=20.0)
    assert decide(client, store, MODEL, first).alias == "challenger", "one picture for all would be as good"
    assert decide(client, store, MODEL, first, Margins(first=100.0)).alias == "champion"
    assert make_version(run, ingested, store, "a", fid=20.0) == first, "the same checkpoint became another version"

    worse = make_version(run, ingested, store, "b", seed=1, fid=25.0)
    decision = decide(client, store, MODEL, worse)
    assert decision.alias == "challenger"
    assert "25.00" in decision.reason
    assert "20.00" in decision.reason
    other = make_version(run, ingested, store, "c", seed=2, fid=1.0, samples=40)
    assert "differ in the number of samples" in decide(client, store, MODEL, other).reason
    bigger = make_version(run, ingested, store, "e", seed=4, fid=1.0, image_size=32, model=f"{MODEL}-32")
    assert make_version(run, ingested, store, "early", seed=40, image_size=32) == early, "it keeps its name on a retry"
    assert tags_of(client.get_model_version(f"{MODEL}-32", bigger))["image_size"] == "32", (
        "another size is another model"
    )
    assert champion_version(client, f"{MODEL}-32") is None, "which has a first version of its own"
    store.write(layout.manifest(ingested.manifest.digest), ingested.manifest.to_json())
    images = ingested.manifest.images
    more = ingested.manifest.model_copy(
        update={"digest": "d" * 64, "images": images.model_copy(update={"classes": (*images.classes, "Roofs")})}
    )
    second = f"{MODEL}-{more.images.kind[:8]}"
    make_version(run, ingested, store, "f", seed=5, fid=1.0, dataset=more, model=second)
    assert champion_version(client, second) is None, "nor does one of other classes compete"
    store.delete(layout.manifest(ingested.manifest.digest))
    better = make_version(run, ingested, store, "d", seed=3, fid=15.0)
    store.write(layout.evidence("a", 2), b"torn")
    assert "is damaged" in decide(client, store, MODEL, better).reason
    store.write(layout.evidence("a", 2), evidence_of(20.0, 80).to_bytes())
    assert decide(client, store, MODEL, better).alias == "champion"
    assert decide(client, store, MODEL, better).alias == "champion", "a repetition changed the decision"
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert champion.version == better
    assert tags_of(champion)["dataset.digest"] == ingested.manifest.digest
    assert set(champion.tags) == {"result", "dataset.name", "git.commit", "decision", "gates", "lineage", "scores"}
    assert champion.tags["result"].startswith("fid_eurosat 15.00")
    assert "fid_eurosat | 15.00 (14.02 to 15.98)" in champion.description
    assert "| fid_eurosat is lower | yes | 15.00 against 20.00" in champion.description
    assert champion.description.index("## Decision") < champion.description.index("## Use")
    assert champion.description.count("## Decision") == 1, "a repetition added it again"
    assert json.loads(champion.tags["gates"])["nothing more is copied"].startswith("passed")
    entries = [json.loads(store.read(name)) for name in store.names("promotions/") if name.endswith(".json")]
    assert [(entry["from"], entry["to"]) for entry in entries] == [(None, first), (first, better)]

    # Of two that end at once, each is judged against the champion of its moment: the best of them is live in the end.
    rivals = [make_version(run, ingested, store, f"rival{n}", seed=10 + n, fid=fid) for n, fid in enumerate((9.0, 5.0))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda rival: decide(client, store, MODEL, rival), rivals))
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert str(champion.version) == rivals[1]
    # Back to an older one is one move of the alias, and stays.
    client.set_registered_model_alias(MODEL, "champion", better)
    assert decide(client, store, MODEL, rivals[1]).alias == "champion", "what was decided once"
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert str(champion.version) == better, "a retry of the run undid the rollback"
    weak = make_version(run, ingested, store, "weak", seed=20, fid=30.0)
    client.set_registered_model_alias(MODEL, "champion", weak)  # by hand, when it is challenger already
    client.set_registered_model_alias(MODEL, "challenger", weak)
    decide(client, store, MODEL, first)
    assert "challenger" not in client.get_model_version(MODEL, weak).aliases, "it is champion"
    client.set_registered_model_alias(MODEL, "champion", better)
    for version in (weak, worse):  # the run of an older one is retried
        assert decide(client, store, MODEL, version).alias == "challenger"
    assert str(client.get_model_version_by_alias(MODEL, "challenger").version) == weak
    champion = champion_version(client, MODEL)
    assert champion is not None
    assert str(champion.version) == better

    # A champion that is moved by hand while another is judged: it is judged again, against the one that is live then.
    class MovedMeanwhile(FolderStore):
        moved = False

        def read(self, name: str) -> bytes:
            if name.endswith("evidence.safetensors") and not self.moved:
                self.moved = True
                client.set_registered_model_alias(MODEL, "champion", first)
            return super().read(name)

    late = make_version(run, ingested, store, "late", seed=21, fid=2.0)
    decision = decide(client, MovedMeanwhile(store.folder), MODEL, late)
    assert (decision.alias, decision.against) == ("champion", first)
    client.set_registered_model_alias(MODEL, "champion", better)

    # More classes than a tag has room for, with names that would begin a cell of a table: each of them is judged all the same.
    classes = {f"class {number:04d}, which has a long name | with a bar": 20.0 for number in range(1500)}
    many = make_version(run, ingested, store, "many", seed=22, fid=4.0, fid_of_class=classes)
    assert decide(client, store, MODEL, many).alias == "champion"
    worst = next(reversed(classes))
    newer = make_version(run, ingested, store, "more", seed=23, fid=1.0, fid_of_class=classes | {worst: 90.0})
    assert decide(client, store, MODEL, newer).alias == "champion"
    (row,) = re.findall(r"^\| no class.*$", client.get_model_version(MODEL, newer).description, re.MULTILINE)
    assert "class 1499" in row
    assert "4.50 times the champion's (of too few samples to judge)" in row
    assert row.count("|") == 4
    store.delete(layout.scores("more", 2))
    lost = make_version(run, ingested, store, "lost", seed=24, fid=0.5, fid_of_class=classes)
    assert "differ in the form of their scores" in decide(client, store, MODEL, lost).reason
    client.set_registered_model_alias(MODEL, "champion", better)

    # Without `site`, nothing but the packages themselves is found: no editable installation, no current folder. And of these
    # none but those that the version's own requirements bring.
    requirements = mlflow.artifacts.download_artifacts(
        f"models:/{MODEL}@champion/requirements.txt", dst_path=str(tmp_path), tracking_uri=mlflow_server.url
    )
    code = f"""
{with_only(Path(requirements).read_text().split())}
sys.path.append({sysconfig.get_paths()["purelib"]!r})
import importlib.util
assert importlib.util.find_spec("diffusion") is None, "the project is importable"
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("models:/{MODEL}@champion")
params = {{"n": 3, "steps": 2, "seed": 5, "label": "Forest"}}
images = model.predict([], params=params)
assert images.shape == (3, 16, 16, 3) and images.dtype == np.uint8, images.shape
assert np.array_equal(images, model.predict([], params=params))
assert np.array_equal(images[:2], model.predict([], params=params | {{"n": 2}}))
assert np.array_equal(images, model.predict([], params=params | {{"n": 11}})[:3])
assert not np.array_equal(images, model.predict([], params=params | {{"seed": 6}}))
assert model.predict([]).shape == (8, 16, 16, 3)
for other in ({{"sampler": "ancestral"}}, {{"guidance": 3.0}}):
    assert not np.array_equal(images, model.predict([], params=params | other))
wrongs = [{{"label": "Desert"}}, {{"n": 0}}, {{"steps": 0}}, {{"n": "many"}}, {{"seed": -1}}, {{"format": "jpg"}}]
for wrong in [*wrongs, {{"sampler": "euler"}}, {{"guidance": -1.0}}]:
    try:
        model.predict([], params=wrong)
    except mlflow.MlflowException as error:
        print(error)
    else:
        raise AssertionError(f"accepted {{wrong}}")
"""
    env = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.url}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "-S", "-P", "-c", code], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "label is 'Desert'; it must be empty or one of AnnualCrop" in done.stdout


SHA = "import sys, hashlib, mlflow; m = mlflow.pyfunc.load_model(sys.argv[1]); " + (
    "print(hashlib.sha256(m.predict([], params={'n': 3, 'steps': 2, 'seed': 5}).tobytes()).hexdigest())"
)


@pytest.mark.slow
@pytest.mark.skipif(
    "TRAIN_DIFFUSION_TEST_INSTALL" not in os.environ,
    reason="installs packages: TRAIN_DIFFUSION_TEST_INSTALL=1 allows it",
)
def test_a_clean_environment_of_the_versions_own_requirements_draws_the_same_bytes(
    run: TrackedRun, ingested: Ingested, tmp_path: Path, mlflow_server: Server
) -> None:
    version = make_version(run, ingested, FolderStore(tmp_path / "store"), "clean", seed=30)
    uri, env = f"models:/{MODEL}/{version}", {**os.environ, "MLFLOW_TRACKING_URI": mlflow_server.url}
    env.pop("PYTHONPATH", None)
    requirements = mlflow.artifacts.download_artifacts(
        f"{uri}/requirements.txt", dst_path=str(tmp_path), tracking_uri=mlflow_server.url
    )
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [
        str(tmp_path / "venv/bin/pip"),
        "install",
        "--quiet",
        "--no-compile",
        "--retries",
        "10",
        "--timeout",
        "60",
    ]
    install += ["-r", requirements]
    done = subprocess.run(install, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = [
        subprocess.run([python, "-P", "-c", SHA, uri], cwd="/", env=env, capture_output=True, text=True)
        for python in (tmp_path / "venv/bin/python", sys.executable)
    ]
    assert [one.returncode for one in drawn] == [0, 0], drawn[0].stderr[-3000:]
    assert drawn[0].stdout == drawn[1].stdout


def test_a_dead_server_is_said_at_once() -> None:
    with pytest.raises(TrackingError, match="does not answer"):
        connect("http://127.0.0.1:9")


def test_a_silent_server_is_said_before_its_user_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.tracking.connection.ANSWER_SECONDS", 2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        accepted = threading.Thread(target=silent.accept, daemon=True)
        accepted.start()
        with pytest.raises(TrackingError, match="does not answer"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("sqlite:///relative.db", "absolute"),
        ("sqlite:////dev/null/mlflow.db", "can't be used"),
        ("sqlite:////tmp/what?/mlflow.db", "has a [?]"),
        ("file:///somewhere", "neither"),
        ("http://user:secret@127.0.0.1:9", "user or password in its address"),
    ],
)
def test_an_unusable_address_says_why_and_keeps_its_secret(uri: str, said: str) -> None:
    with pytest.raises(TrackingError, match=said) as error:
        connect(uri)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_text("these are my notes, not a database " * 100)
    before = path.read_bytes()
    with pytest.raises(TrackingError, match="can't be used"):
        connect(f"sqlite:///{path}")
    assert path.read_bytes() == before
