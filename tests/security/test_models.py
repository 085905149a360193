"""Which models are not loaded at all: names that are none, and files of others where one stands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import diffusion
from diffusion.errors import TrackingError

MODEL = "generated-fields-and-water-ddpm"


@pytest.mark.parametrize("name", ["../x/1", "m/1/../../y", "m", "m@a'b", "http://127.0.0.1/m/1", "m/1\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(TrackingError, match="names no model version"):
        diffusion.load(name)


@pytest.mark.parametrize("other", ["file", "folder"])
def test_what_somebody_else_put_into_the_folder_where_one_stands_is_not_loaded(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRAIN_DIFFUSION_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError, match=r"make env"):
        diffusion.load(f"{MODEL}@champion")
    assert list(tmp_path.iterdir()) == [], "nothing is begun there"
    database = tmp_path / "var" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.touch()
    if os.geteuid() != 0:
        pytest.skip("only root gives files to others")
    os.chown(database if other == "file" else database.parent, 65534, 65534)
    with pytest.raises(TrackingError, match="belongs to another user"):
        diffusion.load(f"{MODEL}@champion")
