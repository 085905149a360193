"""What the clean-up deletes, and what it never does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion.recipe import Start
from diffusion.settings import settings
from diffusion.store.objects import FolderStore, open_store
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.promotion_log import past_champions
from diffusion.tracking.run import RUN_KEY, START_TAG
from diffusion.tracking.version_tags import with_lineage
from diffusion.training.state import steps_with_checkpoint
from mlflow import MlflowClient
from tests.conftest import BIN, free_port, start_server, stop_server

pytestmark = pytest.mark.slow

MODEL = "eurosat-ddpm"
STARTS = {"r3": "r1", "r5": "r2"}  # the champion went on from r1, the run under way goes on from r2


@pytest.fixture
def guarded_server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's server as people have their own: it alone reaches the artifacts, and asks everybody for a password."""
    (home / "mlflow").mkdir(parents=True)
    url, password = f"http://127.0.0.1:{free_port()}", "a password of the tests"
    template = Path(__file__).parents[2] / "mlflow" / "server.ini"
    (home / "auth.ini").write_text(template.read_text().replace("= DATABASE_URI", f"= sqlite:///{home / 'auth.db'}"))
    env = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home / 'mlflow' / 'server.db'}",
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [
        str(BIN / "mlflow"),
        "server",
        "--app-name",
        "basic-auth",
        "--workers",
        "1",
        "--port",
        url.rsplit(":")[-1],
    ]
    command += ["--artifacts-destination", str(settings().artifacts)]
    server = start_server(command, url, f"{url}/health", home, env)
    for name, value in (("URI", url), ("USERNAME", "admin"), ("PASSWORD", password)):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    yield
    stop_server(server)


@pytest.fixture(params=["home_with_mlflow"])
def six_nights(empty_mlflow: Path, home: Path, request: pytest.FixtureRequest) -> MlflowClient:
    """Six runs of which each made a version; version 1 was champion, 4 is, and the last run is under way."""
    request.getfixturevalue(request.param)
    client, experiment_id = open_tracking(settings())
    store = open_store(settings().store_uri)
    client.create_registered_model(MODEL)
    for number in range(6):
        key = f"r{number}"
        tags = {RUN_KEY: key}
        if key in STARTS:
            tags[START_TAG] = Start(run=STARTS[key], step=8, digest="d" * 64).model_dump_json()
        run = client.create_run(experiment_id, start_time=1000 + number, tags=tags)
        model = client.create_logged_model(experiment_id, name="sampler", source_run_id=run.info.run_id)
        (home / "weights").write_bytes(b"weights")
        client.log_model_artifact(model.model_id, str(home / "weights"))
        client.finalize_logged_model(model.model_id, "READY")
        source = f"models:/{model.model_id}"
        client.create_model_version(
            MODEL,
            source,
            run_id=run.info.run_id,
            model_id=model.model_id,
            tags=with_lineage({"checkpoint.digest": "d" * 64}),
            await_creation_for=0,
        )
        if number < 5:
            client.set_terminated(run.info.run_id, "FINISHED" if number != 4 else "FAILED")
        for file in ("model.safetensors", "state.json"):
            store.write(f"checkpoints/{key}/000000008/{file}", b"{}")
        store.write(f"checkpoints/{key}/000000016/model.safetensors", b"never finished")
        for file in ("scores.json", "grid.png", "evidence.safetensors"):
            store.write(f"runs/{key}/evaluations/000000008/{file}", b"{}")
        (settings().runs / key).mkdir(parents=True)
    for number, version in enumerate((1, 4)):
        store.write(f"promotions/{MODEL}/{number:06d}.json", b'{"from": null, "to": "%d"}' % version)
    client.set_registered_model_alias(MODEL, "champion", "4")
    # Somebody else's model on the same server, in an experiment of their own and without a run.
    client.create_registered_model("others")
    theirs = client.create_run(client.create_experiment("others"))
    for run_id in (theirs.info.run_id, theirs.info.run_id, None):
        client.create_model_version("others", source="s3://theirs/model", run_id=run_id, await_creation_for=0)
    return client


def left(client: MlflowClient) -> tuple[list[str], list[str]]:
    store = open_store(settings().store_uri)
    runs = [f"r{n}" for n in range(6) if steps_with_checkpoint(store, f"r{n}")]
    assert [path.name for path in sorted(settings().runs.iterdir())] == runs
    assert {name.split("/")[1] for name in store.names("checkpoints/")} == set(runs)
    evaluated = store.names("runs/")
    assert {name.split("/")[1] for name in evaluated if name.endswith(".png")} == set(runs)
    assert {name.split("/")[1] for name in evaluated if name.endswith(".safetensors")} == set(runs)
    assert len([name for name in evaluated if name.endswith("scores.json")]) == 6, "by which versions are judged"
    return runs, sorted(str(v.version) for v in client.search_model_versions(f"name = '{MODEL}'"))


def weights() -> int:
    return len(list(settings().artifacts.rglob("artifacts/weights")))


@pytest.mark.parametrize("six_nights", ["home_with_mlflow", "guarded_server"], indirect=True)
def test_only_what_nothing_needs_is_deleted(prefect_server: None, six_nights: MlflowClient) -> None:
    from flows.clean_up import clean_up

    store = open_store(settings().store_uri)
    assert isinstance(store, FolderStore)
    assert past_champions(store, 10) == {MODEL: ["1", "4"]}
    killed, under_way = (store.folder / f"checkpoints/.model.safetensors.{number * 16}.part" for number in ("1f", "2e"))
    another_s = store.folder / "checkpoints/.download.part"
    for path in (killed, under_way, another_s):
        path.write_bytes(b"half of it")
    for path in (killed, another_s):
        os.utime(path, (time.time() - 100_000,) * 2)
    would = clean_up(keep_runs=1, keep_versions=1, dry_run=True)
    assert left(six_nights) == ([f"r{n}" for n in range(6)], [str(n) for n in range(1, 7)])
    assert weights() == 6
    assert clean_up(keep_runs=1, keep_versions=1) == would
    assert weights() == 3, "as many files as versions"
    assert str(killed) in would
    assert [killed.exists(), under_way.exists(), another_s.exists()] == [False, True, True]
    assert left(six_nights) == (["r0", "r1", "r2", "r3", "r5"], ["1", "4", "6"])
    assert clean_up(keep_runs=1, keep_versions=1) == [], "a repetition found something"
    # What is copied into a model of the user's own lives on, with the run that it came from.
    six_nights.copy_model_version(f"models:/{MODEL}/1", "production")
    assert clean_up(keep_runs=1, keep_versions=1, keep_champions=0) == []
    assert weights() == 3
    six_nights.delete_registered_model("production")
    # So does what is registered in one of the very files.
    files = six_nights.get_model_version(MODEL, "1")
    six_nights.create_registered_model("landcover")
    model_id = files.source.removeprefix("models:/")
    six_nights.create_model_version("landcover", source=files.source, run_id=files.run_id, model_id=model_id)
    assert clean_up(keep_runs=1, keep_versions=1, keep_champions=0) == []
    assert weights() == 3
    for _ in range(2):  # more than are kept of a model of ours
        six_nights.create_model_version("landcover", source=files.source, run_id=files.run_id, model_id=model_id)
    assert clean_up(keep_runs=1, keep_versions=1, keep_champions=0) == []
    six_nights.delete_registered_model("landcover")
    # An alias of the user's own protects as well, and without the way back an old champion is one of many.
    six_nights.set_registered_model_alias(MODEL, "favourite", "6")
    clean_up(keep_runs=1, keep_versions=1, keep_champions=0)
    assert left(six_nights) == (["r1", "r2", "r3", "r5"], ["4", "6"])
    assert len(six_nights.search_runs([open_tracking(settings())[1]])) == 6
    assert len(six_nights.search_model_versions("name = 'others'")) == 3, "another project's model was cleaned up"


def test_a_run_that_was_deleted_in_mlflow_is_wanted_no_more_but_for_its_live_version(
    prefect_server: None, six_nights: MlflowClient
) -> None:
    from flows.clean_up import clean_up

    runs = {run.data.tags[RUN_KEY]: run for run in six_nights.search_runs([open_tracking(settings())[1]])}
    for key in ("r2", "r3", "r4"):
        six_nights.delete_run(runs[key].info.run_id)
    clean_up(keep_runs=3, keep_versions=6)
    # r3 made the champion, which went on from r1; the run under way goes on from r2; r0 made a champion before.
    assert left(six_nights) == (["r0", "r1", "r2", "r3", "r5"], [str(n) for n in range(1, 7)])
