"""What is looked at before a run computes anything."""

from collections.abc import Callable
from typing import Any

import pytest

from diffusion.errors import RecipeError, StoreError
from diffusion.tracking.connection import Unreachable
from flows import checks


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Has the first tries end with these errors; returns what is added to at each try."""

    def failing(*errors: Exception) -> list[int]:
        tries: list[int] = []

        def request(*_: Any) -> None:
            tries.append(1)
            if len(tries) <= len(errors):
                raise errors[len(tries) - 1]

        monkeypatch.setattr(checks, "check_request", request)
        return tries

    monkeypatch.setattr(checks, "open_tracking", lambda _: None)
    monkeypatch.setattr(checks, "DELAYS", [0.0] * 4)
    return failing


def test_a_night_waits_for_servers_that_are_away_and_a_run_by_hand_says_so(looked: Callable[..., list[int]]) -> None:
    away = StoreError("It does not answer."), Unreachable("MLflow does not answer.")
    tries = looked(*away)
    checks.check_before_compute(None, patient=True)  # type: ignore[arg-type]
    assert len(tries) == 3
    with pytest.raises(StoreError):
        looked(*away) or checks.check_before_compute(None)  # type: ignore[arg-type]


def test_nobody_waits_for_ever_nor_for_what_is_wrong(looked: Callable[..., list[int]]) -> None:
    tries = looked(*[StoreError("It does not answer.")] * 9)
    with pytest.raises(StoreError):
        checks.check_before_compute(None, patient=True)  # type: ignore[arg-type]
    assert len(tries) == 5
    tries = looked(RecipeError("There is no such preset."))
    with pytest.raises(RecipeError):
        checks.check_before_compute(None, patient=True)  # type: ignore[arg-type]
    assert len(tries) == 1
