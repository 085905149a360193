"""How runs end: noted until MLflow knows it, and told by the next start of those that died and could not."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, State
from pydantic import BaseModel, ConfigDict

from diffusion.errors import UserError
from diffusion.tracking.run import OWNER_TAG, run_key
from diffusion.trust.private import read_private, write_private
from diffusion.trust.redaction import fit_to_leave, shown
from flows.owner import Owner, has_left, is_dead, read_owner, sees_the_folder_of
from flows.progress import say

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

    from mlflow import MlflowClient

log = logging.getLogger(__name__)

FLOW = "train-diffusion"
"""The server may run flows of others."""
ENDING = "ending.json"
"""In a run's folder, until MLflow knows how it ended."""
MOST_TASKS = 200
SAMPLED = "cpu_utilization_percentage"
"""What is told of each machine of a run for as long as it lives."""
LOST_SECONDS = 3600.0
"""Of silence, after which a run of a machine whose files are not seen from here is gone."""


class Ending(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str = ""


def note_ending(folder: Path, ending: Ending) -> None:
    """Keep how a run ended where the next start finds it; on a full disk, nowhere."""
    try:
        write_private(folder / ENDING, ending.model_dump_json())
    except OSError as error:
        log.warning("How the run ended can't be noted in %s (%s).", folder, error)


def close_abandoned(client: MlflowClient, experiment_id: str, own_flow_run: str, runs: Path) -> None:
    """Close the MLflow and Prefect runs that still say they run though their process has ended: here, or on a machine that is gone.

    The flow run that asks may have died itself before, and be retried: its MLflow run is closed, and found by what follows.

    Args:
        runs: folder of the runs' folders; in one of them lies how it ended, if MLflow could not be told.
    """
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    for run in running:
        tag, flow_run = run.data.tags.get(OWNER_TAG), run.data.tags.get("prefect.flow_run_id", "")
        owner = read_owner(tag)
        if owner is None and tag is not None:
            say(f"The MLflow run {run.info.run_id} does not say readably whose it is: it is left alone.")
        key = run_key(run)
        if owner is None or not (is_dead(owner) or (key and _is_gone(client, run, owner, runs / key))):
            continue
        dead = f"Its process {owner.pid} on {owner.host} ended without a word; found by flow run {own_flow_run}."
        ending = _noted_ending(run, runs) or Ending(status="FAILED", reason=dead)
        if ending.reason:
            client.set_tag(run.info.run_id, "failure", fit_to_leave(ending.reason)[:5000])
        client.set_terminated(run.info.run_id, ending.status)
        if key:  # told: of the next attempt it would be false
            (runs / key / ENDING).unlink(missing_ok=True)
        if flow_run != own_flow_run and ending.reason == dead:
            crash_flow_run(flow_run, dead)
        say(f"Closed the MLflow run {shown(str(run.info.run_name))}, {ending.status}. {ending.reason}")


def _is_gone(client: MlflowClient, run: MlflowRun, owner: Owner, folder: Path) -> bool:
    """Whether a process that is not seen from here has ended: its folder shows it where this machine sees that, else its silence does.

    Prefect hears nothing of a machine that is lost, and calls its run crashed. It might have been cut off from Prefect alone, or go on
    without its slot: so this counts only where MLflow, too, has heard nothing of the run for an hour.
    """
    if owner.is_seen:
        return False
    if sees_the_folder_of(owner, folder):
        return has_left(owner, folder)
    silent = time.time() - _last_heard_of(client, run)
    return silent > LOST_SECONDS and _has_crashed(run.data.tags.get("prefect.flow_run_id", ""))


def _last_heard_of(client: MlflowClient, run: MlflowRun) -> float:
    """When MLflow was last told what the machine of a run does, in seconds of the epoch; a run that lives tells it all the time."""
    # On a cluster each host has its own.
    names = [name for name in run.data.metrics if name.startswith("system/") and name.endswith(SAMPLED)]
    points = [point for name in names for point in client.get_metric_history(run.info.run_id, name)]
    return max([run.info.start_time, *(point.timestamp for point in points)]) / 1000


def _has_crashed(flow_run: str) -> bool:
    """Whether Prefect calls a flow run crashed; one that ended otherwise has noted how, where it ran."""
    try:
        asked = UUID(flow_run)
        with get_client(sync_client=True) as prefect:
            state = prefect.read_flow_run(asked).state
    except (ObjectNotFound, ValueError):  # of another server, or of a temporary one
        return False
    except Exception as error:  # of a run that is not ours: no reason to keep this one from starting
        say(f"Prefect can't be asked about the flow run {shown(flow_run)}: {type(error).__name__}: {shown(str(error))}")
        return False
    return state is not None and state.type == StateType.CRASHED


def close_tasks_of_ended_runs() -> None:
    """Give tasks that say they run, though their flow run has ended, the end of that run: who was killed could not."""
    ours = FlowFilter.model_validate({"name": {"any_": [FLOW]}})
    ended = FlowRunFilter.model_validate({"state": {"type": {"any_": ["FAILED", "CRASHED", "CANCELLED"]}}})
    running = TaskRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING", "PENDING"]}}})
    with get_client(sync_client=True) as prefect:
        left = prefect.read_task_runs(
            flow_filter=ours, flow_run_filter=ended, task_run_filter=running, limit=MOST_TASKS
        )
        for task in left:
            state = prefect.read_flow_run(task.flow_run_id).state if task.flow_run_id else None
            cancelled = state is not None and state.type == StateType.CANCELLED
            message = state.message if state else None
            end: State[Any] = Cancelled(message=message) if cancelled else Crashed(message=message)
            prefect.set_task_run_state(task.id, end, force=True)


def _noted_ending(run: MlflowRun, runs: Path) -> Ending | None:
    key = run_key(run)
    try:
        return Ending.model_validate_json(read_private(runs / key / ENDING)) if key else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, UserError) as error:
        log.warning("How %s ended can't be read: %s", key, error)
        return None


def crash_flow_run(flow_run: str, reason: str) -> None:
    """Tell Prefect that a run of this flow has crashed, if it thinks that it runs. MLflow, which names the run, may name any."""
    with get_client(sync_client=True) as prefect:
        try:
            run = prefect.read_flow_run(UUID(flow_run))
            state, ours = run.state, prefect.read_flow(run.flow_id).name == FLOW
            if ours and state is not None and state.type in (StateType.RUNNING, StateType.PENDING):
                prefect.set_flow_run_state(UUID(flow_run), Crashed(message=reason), force=True)
        except (ObjectNotFound, ValueError):  # of another server, or of a temporary one
            log.info("Prefect does not know the flow run %s", flow_run)
