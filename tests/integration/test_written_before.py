"""What an earlier release wrote is read, continued bit for bit, compared with and served."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion.data.ingest import ingest
from diffusion.data.manifest import require_dataset
from diffusion.data.shards import read_shard
from diffusion.data.sources.eurosat import read_archive
from diffusion.evaluation.comparison import load_evidence
from diffusion.evaluation.figures import metrics
from diffusion.evaluation.reference import load_reference
from diffusion.evaluation.scores import find_scores
from diffusion.evaluation.statistics import Moments, frechet_distance
from diffusion.jobs.specs import ReferenceJob, TrainingJob
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.tracking.connection import connect
from diffusion.tracking.loading import FILES_TAG
from diffusion.tracking.promotion import Decision, champion_version, decide
from diffusion.tracking.promotion_log import past_champions
from diffusion.tracking.scores_tag import scores_of, scores_tags
from diffusion.training.journal import records
from diffusion.training.state import CheckpointState, load_state
from tests.jobs import start

WRITTEN = Path(__file__).parent.parent / "fixtures" / "before-specs.tar.xz"
MODEL = "generated-fields-and-water-ddpm"
ON_SAPPHIRE_RAPIDS = {
    "model.safetensors": "cfea0333928f3e9db529f3e9c820c918f5342085ec397aaa025934b6b3c2a494",
    "ema-1000.safetensors": "9245e14cfa30a537edd2808c8d51c9be92f9eddd1331d73ff4badb4f1eaa3151",
    "optimizer.safetensors": "8e6a4855203b6f396db5a894544d95dc617e1efe64168e4c0719c933f21423c9",
    "journal.jsonl": "87b66c27fbca3178dc13263c9d8e528e43a53ee73defb8adcddf707b559acbb7",
}
"""What the code of that time makes of the checkpoint on another CPU than the one that the fixture was made on."""


class Before:
    """The unpacked fixture."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, FolderStore(folder / "store")
        self.expected = CheckpointState.model_validate_json(
            (folder / "expected/state.json").read_bytes(), extra="ignore"
        )
        self.run, self.dataset = self.expected.run, self.expected.dataset


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(WRITTEN) as file:
        file.extractall(folder, filter="data")
    return Before(folder)


def test_its_images_are_ingested_to_the_same_digest_and_the_same_shards(before: Before, tmp_path: Path) -> None:
    manifest = require_dataset(before.store, before.dataset)
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
    journal, written = tmp_path / "job/journal.jsonl", before.folder / "expected/journal.jsonl"
    if load_state(before.store, before.run, 16).sha256 not in (before.expected.sha256, ON_SAPPHIRE_RAPIDS):
        # A CPU of another kind rounds in another way. With the same noise, steps still lie close.
        for now, then in zip(records(journal.read_bytes()), records(written.read_bytes()), strict=True):
            assert now["step"] == then["step"]
            assert now["loss"] == pytest.approx(then["loss"], rel=1e-6)
            assert now["gradient_norm"] == pytest.approx(then["gradient_norm"], rel=1e-5)


def test_its_scores_and_its_champion_are_known(before: Before) -> None:
    scores = find_scores(before.store, before.run, 16, samples=80, checkpoint=before.expected.digest)
    assert scores is not None
    dataset = require_dataset(before.store, before.dataset)
    evidence = load_evidence(before.store, before.run, scores, classes=len(dataset.images.classes))
    assert evidence.features.shape == (80, 128)
    in_turn = np.arange(80) % len(dataset.images.classes)
    np.testing.assert_array_equal(evidence.labels, in_turn)  # it did not say; classes are judged all the same
    assert past_champions(before.store, 5) == {MODEL: ["1"]}
    version = champion_version(_tracking(before), MODEL)
    assert version is not None
    assert scores_of(version, before.store) == scores
    assert version.run_id is not None
    logged = _tracking(before).get_run(version.run_id).data.metrics
    then = {name: value for name, value in logged.items() if name.startswith("score")}
    assert metrics(scores) == then, "its figures have the names and the values that they had"
    assert scores.parts("fid_of_class")


@pytest.mark.slow
@pytest.mark.parametrize(
    "load",
    [
        f"import mlflow; m = mlflow.pyfunc.load_model('models:/{MODEL}@champion')",
        f"import diffusion; m = diffusion.load('{MODEL}@champion')",
    ],
    ids=["mlflow", "ours"],
)
def test_its_champion_is_served(before: Before, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the version brings the code that it was made with, also where today's is imported already."""

    # Of the files that its digest is of, the fixture has not all: the weights of extractors are large.
    _tracking(before).delete_model_version_tag(MODEL, "1", FILES_TAG)
    code = (
        f"{load}; import sys, numpy; before = {{**sys.modules}}, [*sys.path];"
        "numpy.save('served.npy', m.predict([], params={'n': 2, 'steps': 3, 'seed': 5}));"
        "assert {n: m for n, m in sys.modules.items() if n in before[0]} == before[0] and sys.path == before[1]"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _uri(before))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=before.folder)
    served = np.load(before.folder / "served.npy").astype(int)
    assert np.abs(served - np.load(before.folder / "expected/served.npy")).max() <= 1


@pytest.mark.slow
def test_new_versions_are_judged_against_its_champion(before: Before, tmp_path: Path) -> None:
    client, store = _tracking(before), before.store
    champion = champion_version(client, MODEL)
    assert champion is not None
    spec = ReferenceJob(
        run="reference",
        store=store.uri,
        dataset=before.dataset,
        shard_copies=tmp_path,
        image_size=16,
        extractor="eurosat",
    )
    start(tmp_path / "job", spec, "diffusion.evaluation.measure_reference", 1)
    old = scores_of(champion, store)
    assert old is not None
    by, evidence = old.extractors[0], load_evidence(store, before.run, old)
    reference = load_reference(store, layout.reference(before.dataset, by.name, by.sha256, 16))

    def judged(run: str, features: NDArray[np.float32]) -> Decision:
        data = replace(evidence, features=features).to_bytes()
        store.write(layout.evidence(run, old.step), data)
        fid = frechet_distance(Moments.of(features), reference.train)
        rows = tuple(row.model_copy(update={"value": fid}) if row.figure == "fid" else row for row in old.rows)
        new = old.model_copy(update={"rows": rows, "evidence_sha256": hashlib.sha256(data).hexdigest()})
        kept = {key: tag for key, tag in champion.tags.items() if not key.startswith(("decision", "gate."))}
        version = client.create_model_version(
            MODEL, source=str(champion.source), tags=kept | scores_tags(new) | {"run": run}
        )
        return decide(client, store, MODEL, str(version.version))

    again = judged("again", evidence.features)
    assert (again.alias, again.against) == ("challenger", "1")
    assert "fails 'fid_eurosat is lower'" in again.reason
    real = np.random.default_rng(0).choice(reference.train_features, len(evidence.features))
    better = judged("better", real)
    assert (better.alias, better.against) == ("champion", "1"), better.reason
    assert {gate.name for gate in better.gates} == {
        "fid_eurosat is lower",
        "bits_per_dim is not higher",
        "no class has collapsed",
        "nothing more is copied",
    }


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
