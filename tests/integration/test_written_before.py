"""What an earlier release wrote is read, continued bit for bit, compared with and served."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data.ingest import find_dataset, ingest
from diffusion.data.shards import read_shard
from diffusion.data.sources.eurosat import read_archive
from diffusion.data.store import FolderStore
from diffusion.evaluation.comparison import load_evidence
from diffusion.evaluation.figures import metrics
from diffusion.evaluation.scores import find_scores
from diffusion.job import TrainingJob
from diffusion.tracking.connection import connect
from diffusion.tracking.promotion import champion_version, past_champions, scores_of
from diffusion.training.state import State, load_state
from tests.jobs import start

WRITTEN = Path(__file__).parent.parent / "fixtures" / "before-specs.tar.xz"
MODEL = "generated-fields-and-water-ddpm"


class Before:
    """The unpacked fixture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, FolderStore(folder / "store")
        self.expected = State.model_validate_json((folder / "expected/state.json").read_bytes(), extra="ignore")
        self.run, self.dataset = self.expected.run, self.expected.dataset


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(WRITTEN) as file:
        file.extractall(folder, filter="data")
    return Before(folder)


def test_its_images_are_ingested_to_the_same_digest_and_the_same_shards(before: Before, tmp_path: Path) -> None:
    manifest = find_dataset(before.store, before.dataset)
    assert manifest is not None
    folder = f"datasets/{manifest.digest}"
    for shard in manifest.shards:
        for sample in read_shard(before.store.read(f"{folder}/{shard.name}"), shard.name):
            assert sample.label is not None
            place = tmp_path / "2750" / manifest.images.classes[sample.label] / f"{sample.key}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(sample.content)
    again = FolderStore(tmp_path / "store")
    made = ingest(read_archive(tmp_path / "2750", manifest.source, manifest.licence), again)
    assert made == manifest, "format 1 is read as what is written today, down to the statistics"
    for shard in made.shards:
        assert again.read(f"{folder}/{shard.name}") == before.store.read(f"{folder}/{shard.name}")


@pytest.mark.slow
def test_its_training_is_continued_to_the_same_bits(before: Before, tmp_path: Path) -> None:
    state = load_state(before.store, before.run, 14)
    assert state.recipe.digest == before.expected.recipe.digest
    spec = TrainingJob(
        run=before.run,
        store=before.store.uri,
        dataset=before.dataset,
        shard_copies=tmp_path,
        recipe=state.recipe,
        until=16,
        checkpoint_every=1000,
    )
    start(tmp_path / "job", spec, "diffusion.training.job", 1)
    assert load_state(before.store, before.run, 16).sha256 == before.expected.sha256
    assert (tmp_path / "job/journal.jsonl").read_bytes() == (before.folder / "expected/journal.jsonl").read_bytes()


def test_its_scores_and_its_champion_are_known(before: Before) -> None:
    scores = find_scores(before.store, before.run, 16, samples=80, checkpoint=before.expected.digest)
    assert scores is not None
    evidence = load_evidence(before.store, before.run, scores)
    assert evidence.features.shape == (80, 128)
    assert past_champions(before.store, 5) == {MODEL: ["1"]}
    version = champion_version(_tracking(before), MODEL)
    assert version is not None
    assert scores_of(version) == scores
    assert version.run_id is not None
    logged = _tracking(before).get_run(version.run_id).data.metrics
    then = {name: value for name, value in logged.items() if name.startswith("score")}
    assert metrics(scores) == then, "its figures have the names and the values that they had"
    assert scores.parts("fid_of_class")


@pytest.mark.slow
def test_its_champion_is_served(before: Before, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the version brings the code that it was made with."""
    import subprocess
    import sys

    _tracking(before)
    code = (
        f"import mlflow, numpy; m = mlflow.pyfunc.load_model('models:/{MODEL}@champion');"
        "numpy.save('served.npy', m.predict([], params={'n': 2, 'steps': 3, 'seed': 5}))"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _uri(before))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=before.folder)
    served = np.load(before.folder / "served.npy").astype(int)
    assert np.abs(served - np.load(before.folder / "expected/served.npy")).max() <= 1


def _uri(before: Before) -> str:
    return f"sqlite:///{before.folder / 'mlflow/mlflow.db'}"


def _tracking(before: Before) -> Any:
    """MLflow on the fixture's database, whose artifacts lie where it was unpacked."""
    with sqlite3.connect(before.folder / "mlflow/mlflow.db") as database:
        columns = {"experiments": "artifact_location", "runs": "artifact_uri", "logged_models": "artifact_location"}
        for table, column in columns.items():
            database.execute(f"UPDATE {table} SET {column} = replace({column}, '/tmp/fx', ?)", (str(before.folder),))
        database.execute(
            "UPDATE model_versions SET storage_location = replace(storage_location, '/tmp/fx', ?)",
            (str(before.folder),),
        )
    return connect(_uri(before))


def test_the_fixture_is_of_the_first_format(before: Before) -> None:
    manifest = json.loads(before.store.read(f"datasets/{before.dataset}/manifest.json"))
    assert manifest["format_version"] == 1
    assert "pixel_mean" in manifest
