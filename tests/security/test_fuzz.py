"""Readers of what others may have written: an answer or a UserError comes out. `python -m tests.security.fuzz` goes on for longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.security.fuzz import Target, fuzz, targets

NAMES = (
    "zip",
    "tar",
    "webdataset",
    "parquet",
    "pictures",
    "shard",
    "manifest",
    "spec",
    "state",
    "scores",
    "promotions",
    "journal",
    "recipe",
    "overrides",
    "options",
    "processes",
    "owner",
    "argv",
    "parameters",
)
ANSWER_ALWAYS = {"spec", "scores", "journal", "owner", "argv", "parameters"}
"""Those that say "none" in place of an error."""
TRIES = 100


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_all_are_tried(known: dict[str, Target]) -> None:
    assert set(known) == set(NAMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_user_errors_comes_out(known: dict[str, Target], tmp_path: Path, name: str) -> None:
    for seed in known[name].seeds:
        known[name].read(seed)
    tried, refused = fuzz(known[name], random.Random(1), lambda tried: tried < TRIES, tmp_path / name)
    assert tried == TRIES
    assert refused == 0 if name in ANSWER_ALWAYS else refused > TRIES / 20
