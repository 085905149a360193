"""Which failures are worth another try."""

from __future__ import annotations

from typing import Any

from prefect import Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import State

from diffusion.errors import StoreError, TrackingError, UserError


async def worth_retrying(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """A crash, or a server that did not answer; not what the user has to change first."""
    try:
        await state.result()
    except (StoreError, TrackingError):
        return True
    except UserError:
        return False
    except Exception:
        return True
    return False
