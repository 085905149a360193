"""Names that come from tags, databases and parameters lead nowhere, and what can't be read is passed over, not fatal."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.errors import DataError, RecipeError, StoreError
from diffusion.evaluation.reference import Reference, load_reference, write_reference
from diffusion.evaluation.statistics import Moments
from diffusion.jobs.specs import TrainingJob
from diffusion.recipe import Start
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store.objects import FolderStore
from diffusion.store.s3 import S3Store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.promotion_log import Promotion, past_champions
from diffusion.tracking.run import OWNER_TAG, RUN_KEY, START_TAG, recorded_start, unfinished_run
from diffusion.training.state import CheckpointState
from flows.engines.local import usable_processes
from flows.request import TrainingRequest
from mlflow import MlflowClient
from tests.conftest import Ingested, tiny_recipe

TRAVERSALS = [
    "../../victim",
    "/etc",
    "a/../../b",
    "..",
    ".",
    "a//b",
    "a/./b",
    "x\\..\\y",
    "a\nb",
    "\x1b[2J",
    "a\0b",
    "x" * 2000,
]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_store_takes_a_name_that_leads_out_of_it(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for store in (FolderStore(tmp_path / "stores" / "one"), S3Store("bucket", "prefix")):
        for use in (
            store.read,
            store.delete,
            store.names,
            lambda n, s=store: s.write(n, b"x"),
            lambda n, s=store: s.create(n, b"x"),
        ):
            with pytest.raises(StoreError, match="no name of an object"):
                use(name)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "\x1b[2J", os.fsdecode(b"not\xfftext")])
def test_what_others_put_into_a_store_under_an_odd_name_is_passed_over(tmp_path: Path, name: str) -> None:
    store = FolderStore(tmp_path)
    store.write("runs/mine", b"")
    (tmp_path / "runs" / name).touch()
    (tmp_path / "runs" / "folder").mkdir()
    assert store.names("runs/") == ["runs/mine"]
    with pytest.raises(StoreError, match="can't be written"):
        store.delete("runs/folder")


@given(st.text())
def test_a_name_that_is_taken_stays_in_the_folder(name: str) -> None:
    folder = Path("/store")
    try:
        path = FolderStore(folder).path(name)
    except StoreError:
        return
    assert path.resolve().is_relative_to(folder)


@pytest.mark.parametrize("name", [*TRAVERSALS, "", "-rf", ".hidden", "a b", "a'b", "a`b", "é"])
def test_a_run_is_not_named_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run"):
        Start(run=name, step=1, digest="d" * 64)
    fields = {"store": "x", "dataset": "d" * 64, "shard_copies": tmp_path, "recipe": tiny_recipe(), "until": 1}
    with pytest.raises(ValueError, match="run"):
        TrainingJob.model_validate(fields | {"run": name, "checkpoint_every": 1})
    state = {
        "format_version": 1,
        "step": 1,
        "images_seen": 16,
        "dataset": "d" * 64,
        "recipe": tiny_recipe(),
        "sha256": {},
    }
    with pytest.raises(ValueError, match="run"):
        CheckpointState.model_validate(state | {"run": name})
    with pytest.raises(ValueError, match="sha256"):
        CheckpointState.model_validate(state | {"run": "r", "sha256": {"../x": "d" * 64}})


@pytest.fixture
def hostile(home_with_mlflow: Path) -> tuple[MlflowClient, str, Path]:
    """An experiment in which somebody has written into the tags of runs, and a folder that they are after."""
    home = home_with_mlflow
    client, experiment = open_tracking(settings())
    victim = home.parent / "victim"
    (victim / "deep").mkdir(parents=True)
    (victim / "deep" / "thesis.tex").write_text("mine")
    recipe, digest = tiny_recipe(), "d" * 64
    same = {"recipe.digest": recipe.digest, "dataset.digest": digest, "git.commit": "c" * 40}
    for tags in (
        {RUN_KEY: "../../victim"},
        {RUN_KEY: "../victim"},
        {RUN_KEY: str(victim)},
        {RUN_KEY: "fine", START_TAG: "{"},
        {RUN_KEY: "fine2", START_TAG: "[" * 5000, OWNER_TAG: "[" * 5000},
        {RUN_KEY: "fine3", OWNER_TAG: json.dumps({"host": "../..", "pid": "x"}), "prefect.flow_run_id": "'; DROP"},
        {RUN_KEY: "../../victim", **same},
    ):
        run = client.create_run(experiment, tags=tags)
        client.set_terminated(run.info.run_id, "FAILED")
    client.create_run(experiment, tags={OWNER_TAG: "not a process"})
    return client, experiment, victim


@pytest.mark.slow
def test_clean_up_deletes_no_path_out_of_a_tag_and_only_what_a_dry_run_lists(
    prefect_server: None, hostile: tuple[MlflowClient, str, Path], home: Path
) -> None:
    from flows.clean_up import clean_up

    client, experiment, victim = hostile
    store = FolderStore(Path(settings().store_uri))
    keys = ["old", "newest"]
    for key in keys:
        run = client.create_run(experiment, tags={RUN_KEY: key}, start_time=keys.index(key) + 10**13)
        client.set_terminated(run.info.run_id, "FINISHED")
        store.write(f"checkpoints/{key}/000000008/state.json", b"{}")
        store.write(f"checkpoints/{key}/notes of mine/plan.txt", b"not a checkpoint")
    # A model whose files are said to lie elsewhere: whoever may write MLflow's database may say anything.
    would = clean_up(keep_runs=1, keep_versions=1, dry_run=True)
    assert would == [f"{store.uri}/checkpoints/old/000000008/state.json"]
    before = {path: path.read_bytes() for path in Path(store.uri).rglob("*") if path.is_file()}
    assert clean_up(keep_runs=1, keep_versions=1) == would
    gone = before.keys() - set(Path(store.uri).rglob("*"))
    assert {str(path) for path in gone} == set(would)
    assert (victim / "deep" / "thesis.tex").read_text() == "mine"


def test_a_version_s_files_elsewhere_are_left(home_with_mlflow: Path) -> None:
    from flows.clean_up import version_remains

    home = home_with_mlflow
    client, experiment = open_tracking(settings())
    model = client.create_logged_model(experiment, name="sampler")
    client.create_registered_model("m")
    version = client.create_model_version("m", source=f"models:/{model.model_id}")
    database = settings().tracking_uri.removeprefix("sqlite:///")
    root, local = f"file://{home}/mlflow/artifacts/1", home / "mlflow" / "artifacts"
    local.mkdir(parents=True, exist_ok=True)
    (local / "out").symlink_to("/etc")
    for location, ours in {
        f"{root}/models/m-1/artifacts": True,
        f"{root}/../../../../victim": False,
        f"{root}/%2e%2e/%2e%2e/%2e%2e/victim": False,
        f"file://{home}/victim": False,
        "/etc": False,
        f"file://{local}/out/x": False,
        "s3://somebody/else": False,
    }.items():
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE logged_models SET artifact_location = ?", (location,))
        assert (version_remains(client, "m", str(version.version), root, local) is not None) == ours, location


def test_one_bad_tag_stops_no_later_run(hostile: tuple[MlflowClient, str, Path], ingested: Ingested) -> None:
    from flows.endings import close_abandoned

    client, experiment, _ = hostile
    close_abandoned(client, experiment, "11111111-1111-1111-1111-111111111111", settings().runs)
    dataset = ingested.manifest.model_copy(update={"digest": "d" * 64})
    assert unfinished_run(client, experiment, tiny_recipe(), dataset, "c" * 40) is None
    assert recorded_start(client, experiment, "fine") == (False, None)


@pytest.mark.parametrize("entry", [b"", b"[]", b'{"to": "1"}', b'{"from": null, "to": "../../x"}', b"[" * 100_000])
def test_a_damaged_promotion_is_named(tmp_path: Path, entry: bytes) -> None:
    store = FolderStore(tmp_path)
    store.write("promotions/m/000000.json", entry)
    with pytest.raises(DataError, match=r"promotions/m/000000\.json can't be read"):
        past_champions(store, 10)


def test_a_promotion_with_a_changed_figure_is_damaged_and_one_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    store, name = FolderStore(tmp_path), "promotions/m/000000.json"
    written = Promotion("6", "7").to_bytes()
    store.write(name, written)
    assert past_champions(store, 10) == {"m": ["6", "7"]}
    store.write(name, written.replace(b'"7"', b'"1"'))
    with pytest.raises(DataError, match="can't be read"):
        past_champions(store, 10)
    store.write(name, b'{"from": "6", "to": "7", "reason": "", "gates": []}')
    assert past_champions(store, 10) == {"m": ["6", "7"]}


def test_a_reference_that_was_changed_or_damaged_is_not_used(tmp_path: Path) -> None:
    import numpy as np

    store, name = FolderStore(tmp_path), "references/x.safetensors"
    features = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    write_reference(store, name, Reference(Moments.of(features), features, np.zeros(20, np.int64), features))
    whole = store.read(name)
    assert np.array_equal(load_reference(store, name).train_features, features)
    for changed in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50], b"", whole + b"\0"):
        store.write(name, changed)
        with pytest.raises(DataError, match="damaged"):
            load_reference(store, name)
    store.write(name, whole)
    store.write("references/x.json", b'{"format_version": 1, "sha256": "' + b"0" * 64 + b'", "checksum": "x"}')
    with pytest.raises(DataError, match="damaged"):
        load_reference(store, name)
    store.delete("references/x.json")  # as earlier versions left it
    with pytest.raises(DataError, match="must be measured"):
        load_reference(store, name)


@pytest.mark.parametrize("preset", ["../presets/demo", "/etc/passwd", "demo/../demo", "demo\n", "..", "demo\0"])
def test_a_preset_is_one_of_ours_or_a_file_that_is_meant(preset: str) -> None:
    with pytest.raises(RecipeError, match="There is no preset"):
        load_recipe(preset)


ABSURD = {
    "data.images": 10**18,
    "data.batch_size": 10**12,
    "data.lanes": 2**40,
    "network.width": 10**9,
    "network.multipliers": [1] * 1000,
    "network.blocks": 10**6,
    "process.log_snr_max": 1e300,
    "optimizer.learning_rate": float("inf"),
    "optimizer.betas": [2.0, 2.0],
    "ema.ramp": 1e9,
    "ema.half_lives": list(range(1, 10_000)),
    "evaluation.samples": 10**12,
    "evaluation.sampler_steps": 10**9,
    "evaluation.every_images": 1,
    "seed": 10**30,
}


@pytest.mark.parametrize("key", ABSURD)
def test_every_parameter_has_an_upper_end(key: str) -> None:
    more = {"data.images": 10**9} if key == "evaluation.every_images" else {}
    with pytest.raises(RecipeError):
        load_recipe("demo", {key: ABSURD[key], **more})


TEXTS = [
    "!!python/object/apply:os.system ['true']",
    "[" * 5000,
    "{" * 5000,
    "2001-99-99",
    "9" * 5000,
    "'",
    "&a [*a]",
    "x" * 20_000,
    "%",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_typed_as_text_is_a_sentence_or_a_value(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("demo", {"data.images": text})
    assert len(str(error.value)) < 600
    assert "\n" not in str(error.value)


def test_a_thousand_processes_on_few_cores_are_refused() -> None:
    recipe = load_recipe("demo", {"data.lanes": 1024, "data.batch_size": 1024})
    with pytest.raises(RecipeError, match="1,024 processes"):
        usable_processes(recipe, 1024)
    with pytest.raises(ValueError, match="seed"):
        TrainingRequest(preset="demo", seed=2**64)
