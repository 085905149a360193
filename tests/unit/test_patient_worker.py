"""The worker outlives an absence of Prefect's server, however long, and nothing else that is wrong."""

import asyncio
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import httpx
import pytest

# By its path: on sys.path, infra/ would hide a module of Python's own.
_spec = spec_from_file_location("patient_worker", Path(__file__).parents[2] / "infra" / "patient_worker.py")
assert _spec is not None
assert _spec.loader is not None
patient_worker = module_from_spec(_spec)
_spec.loader.exec_module(patient_worker)


class Enough(Exception):
    """Ends a loop that would go on for ever."""


def polls(*answers: Exception | None) -> int:
    """How often the server is asked that gives these answers, until one of them ends the loop."""
    asked = 0

    async def poll() -> None:
        nonlocal asked
        asked += 1
        if (answer := answers[asked - 1]) is not None:
            raise answer

    with pytest.raises((Enough, httpx.HTTPStatusError)):
        asyncio.run(patient_worker.patient_loop(workload=poll, interval=0, jitter_range=0.3, backoff=4))
    return asked


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://x")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code, request=request))


def test_a_server_that_is_away_or_ill_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_worker, "AGAIN_SECONDS", 0)
    away = [httpx.ConnectError("refused"), status(500), httpx.ReadTimeout("silent")] * 20
    assert polls(*away, None, *away, Enough()) == 122


def test_what_it_answers_for_good_ends_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_worker, "AGAIN_SECONDS", 0)
    assert polls(status(502), status(401), None) == 2
