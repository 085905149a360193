"""Nights: flow runs that a schedule made. They are told by that, and not by parameters that an edited schedule may lose."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterId, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort

from diffusion.errors import RecipeError

Nights = Literal["new seed", "new data"]
"""What scheduled nights are for: another seed each, or one training of what has not been trained yet."""
BY_SCHEDULE = "auto-scheduled"
"""The tag that Prefect's scheduler gives to what it makes."""


def is_night() -> bool:
    """Whether a schedule made this flow run."""
    return BY_SCHEDULE in runtime.flow_run.tags


def check_nights(nights: Nights, start_from: str) -> None:
    """Raises RecipeError for what a night can't do: it would fail each time, or train on where nothing has changed."""
    if is_night() and nights == "new data" and start_from == "champion":
        raise RecipeError(
            "nights: new data and start_from: champion do not go together: a model goes on with the images that it knows alone. Set "
            "start_from: scratch, or nights: new seed."
        )


def seed_of(given: int | None, nights: Nights = "new seed") -> int:
    """The seed; none given: a night's is its date, as 20261124, if nights are for that; else 0."""
    if given is not None or not is_night() or nights == "new data":
        return given or 0
    return int(f"{newest_night():%Y%m%d}")


def newest_night() -> datetime:
    """When the newest night was due that had come when this one began: of several missed ones one runs, and stands for that.

    A retry, days later, is the same night still.
    """
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(UUID(str(runtime.flow_run.id)))
        begun = own.start_time or datetime.now(UTC)
        nights = {
            "deployment_id": {"any_": [own.deployment_id]} if own.deployment_id else {"is_null_": True},
            "tags": {"all_": [BY_SCHEDULE]},
            "expected_start_time": {"before_": begun},
        }
        due = client.read_flow_runs(
            flow_filter=FlowFilter(id=FlowFilterId(any_=[own.flow_id])),
            flow_run_filter=FlowRunFilter.model_validate(nights),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    times = [run.expected_start_time for run in (*due, own) if run.expected_start_time is not None]
    return max(times, default=begun)
