"""A model version whose files were changed where they lie: none of its code runs when it is loaded by our own function."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.errors import TrackingError
from diffusion.tracking.connection import connect
from diffusion.tracking.loading import load_version
from diffusion.tracking.run import TrackedRun, open_experiment
from tests.conftest import Ingested, tiny_recipe
from tests.integration.test_tracking import LINEAGE, MODEL, make_version

CHANGES = {
    "code/diffusion/denoiser.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "sampler.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "code/sitecustomize.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "artifacts/weights.safetensors": "other weights",
}


def test_changed_files_are_refused_before_their_code_runs(ingested: Ingested, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    experiment = open_experiment(client, tmp_path / "artifacts")
    run = TrackedRun.open(client, experiment, "r", LINEAGE, tiny_recipe(), ingested.manifest, str(tmp_path / "store"))
    version = make_version(run, ingested, type(ingested.store)(tmp_path / "store"), "files")
    loaded = load_version(f"{MODEL}/{version}", uri)
    assert loaded.predict([], params={"n": 1, "steps": 1}).shape == (1, 16, 16, 3)

    (folder,) = {path.parent for path in (tmp_path / "artifacts").rglob("MLmodel")}
    marker = tmp_path / "it ran"
    for name, content in CHANGES.items():
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(content.format(marker=str(marker)))
        with pytest.raises(TrackingError, match="nothing of them was run"):
            load_version(f"{MODEL}/{version}", uri)
        assert not marker.exists()
        path.unlink() if before is None else path.write_bytes(before)
    load_version(f"models:/{MODEL}/{version}", uri)


@pytest.mark.parametrize("name", ["../x/1", "m/1/../../y", "m", "m@a'b", "http://127.0.0.1/m/1", "m/1\n"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="names no model version"):
        load_version(name, f"sqlite:///{tmp_path}/mlflow.db")
