"""What begins a job on a cluster anew, and what does not."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from diffusion.jobs.specs import SPEC
from flows.engines.placement import PLACEMENT, Placement

pytest.importorskip("ray", reason="jobs on a cluster need the extra ray")


class NoRequest:
    """To stop."""

    def is_made(self) -> bool:
        return False


class Started:
    """An attempt that ends as it is told, with one worker."""

    failure = None
    reports: tuple[()] = ()
    reasons: frozenset[str] = frozenset()

    def __init__(self, *_: Any) -> None:
        pass

    def end(self) -> None:
        pass


def test_room_that_no_worker_fits_into_is_not_made_room_for_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free in all may lie on several hosts, or be a GPU on one and cores on another."""
    from flows.engines import driver
    from flows.engines.attempt import Place

    (tmp_path / PLACEMENT).write_text(Placement(module="m", counts=(1, 2), gpu=False).model_dump_json())
    (tmp_path / SPEC).write_text(json.dumps({"store": (tmp_path / "store").as_uri(), "run": "run"}))
    looked_from: list[float] = []

    def follow(attempt: Any, placement: Any, stop: Any, grow_from: float) -> bool:
        looked_from.append(grow_from - time.monotonic())
        return len(looked_from) < 3  # ended to grow, twice

    places = iter([Place(None, 1), Place(None, 1), Place(None, 2)])
    monkeypatch.setattr(driver, "Attempt", Started)
    monkeypatch.setattr(driver, "reserve", lambda placement, stop: next(places))
    monkeypatch.setattr(driver, "follow", follow)
    stop: Any = NoRequest()
    assert driver.run(tmp_path, stop)
    first, after_nothing, after_more = looked_from
    assert first < 0
    assert after_nothing > driver.HELD_SECONDS - 60
    assert after_more <= after_nothing, "growing is no reason to wait longer"
