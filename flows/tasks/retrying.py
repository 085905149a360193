"""Which failures are worth another try."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import State

from diffusion.errors import ClusterError, RunBusy, StoreError, StoreRefuses, TrackingError, UserError
from diffusion.tracking.connection import Unreachable
from flows.progress import say

T = TypeVar("T")


async def worth_retrying(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """A crash, a server that did not answer, a run that is about to be free; not what the user has to change first."""
    try:
        await state.result()
    except (RunBusy, StoreError, TrackingError):
        return True
    except UserError:
        return False
    except Exception:
        return True
    return False


DELAYS: list[float] = [5, 15, 45, 120]
"""Seconds before each new try: a server that is restarted, or away for three minutes, ends no run."""
RETRIED: dict[str, Any] = {
    "retries": len(DELAYS),
    "retry_delay_seconds": DELAYS,
    "retry_condition_fn": worth_retrying,
}
"""Options of every task of the flow."""


def patiently(call: Callable[[], T], delays: Sequence[float] = DELAYS) -> T:
    """What a call outside of tasks returns, made again while a server does not answer. Raises the last such error, and all others."""
    for delay in [*delays, None]:
        try:
            return call()
        except (StoreError, Unreachable, ClusterError) as error:
            if delay is None or isinstance(error, StoreRefuses):
                raise
            say(f"{error} Looking again in {delay:.0f} s.")
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")
