"""What tests that kill share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.report import Kill
from tests.running import mails, received
from tests.stack import Project, running_project

__all__ = ["mails", "received"]

COMMIT = "c" * 40


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[list[Kill]], None]:
    """Puts kills, with what came of them, on the table."""
    return lambda kills: record_property("kills", json.dumps([asdict(kill) for kill in kills]))


@pytest.fixture(scope="package")
def project(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Project]:
    """A stack to be struck. Nights come first: they count all that is in it."""
    with running_project(
        tmp_path_factory.mktemp("faults"), archive, TRAIN_DIFFUSION_COMMIT=COMMIT, MLFLOW_DISABLE_TELEMETRY="true"
    ) as running:
        yield running


@pytest.fixture(scope="package")
def stack(project: Project) -> Project:
    """By the name that `received` knows it by."""
    return project
