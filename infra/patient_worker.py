"""Prefect's worker, which does not give up while the server is away: `python -P infra/patient_worker.py worker start …`, as `prefect`.

Prefect's own ends after a dozen polls without an answer, a minute and a half where the server answers that it is ill. Its runs, which
need the server least of all, would end with it, and where nothing starts it again, so would all nights. -P: nothing of this folder
is imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from prefect._internal import observers
from prefect.cli import app
from prefect.workers import base

AGAIN_SECONDS = 30.0

log = logging.getLogger("prefect.worker")
_of_prefect = base.critical_service_loop


async def patient_loop(workload: Callable[..., Awaitable[Any]], **options: Any) -> None:
    """In place of Prefect's: a poll that the server did not answer is none."""

    async def ask() -> None:
        try:
            await workload()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            log.warning("Prefect does not answer (%s): asked again in %.0f s.", type(error).__name__, AGAIN_SECONDS)
            await asyncio.sleep(AGAIN_SECONDS)

    await _of_prefect(workload=ask, **options)


if __name__ == "__main__":
    os.environ["FLOW_RUN_WORKER"] = str(os.getpid())  # flows/deployed.py watches whether it lives
    base.critical_service_loop = patient_loop  # type: ignore[assignment]
    observers.critical_service_loop = patient_loop  # type: ignore[assignment]  # by which it hears of cancellations
    app()
