"""What a deployed run does beside its work: it is the only one here, ends with its worker, and has pages tell why it ended."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import IO, Any

import psutil
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort
from prefect.states import Cancelled, Crashed, State

from diffusion.errors import RunBusy, UserError
from diffusion.jobs.lock import LOCK_SECONDS, lock_folder
from diffusion.jobs.started import ancestors
from diffusion.trust.private import read_private, write_private
from diffusion.trust.redaction import shown
from flows.endings import MOST_TASKS, crash_flow_run
from flows.progress import say

log = logging.getLogger(__name__)

WORKER = "FLOW_RUN_WORKER"
"""The variable in which a worker gives its flow runs its pid: infra/patient_worker.py."""
ONLY_RUN = "stack/only-run"
"""In the home, what a deployed run locks."""
WATCH_SECONDS = 1.0
TELL_SECONDS = 3.0
WORKER_DIED = "The worker that ran it has died."
_held: list[IO[bytes]] = []
_why: list[str] = []
"""Why this process ends, if it knows."""


def be_the_only_run(home: Path, name: str, flow_run: str, seconds: float = LOCK_SECONDS) -> None:
    """Keep other deployed runs of this home from beginning until this process ends: Prefect's own limit lets a retry pass.

    Raises RunBusy, with the name of the run that is under way. If that is this very run, Abort: Prefect tells of one crash twice,
    the second time up to half a minute late, and a retry in between is started twice. The first goes on, and its state is the run's.
    """
    folder = home / ONLY_RUN
    try:
        _held.append(lock_folder(folder, seconds))
    except RunBusy:
        try:
            other, _, its_flow_run = read_private(folder / "name").partition("\n")
        except (OSError, UserError):
            other, its_flow_run = "another one", ""
        if its_flow_run == flow_run:
            say("This run is under way already, in another process, which goes on.")
            raise Abort from None
        raise RunBusy(
            f"One run at a time: {shown(other)} is under way here. Wait for it to end, or cancel it, and retry this one."
        ) from None
    write_private(folder / "name", f"{name}\n{flow_run}")


def say_why(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """A hook: have the page's last word be the reason, where Prefect's own says how the process was ended."""
    if _why and state.message != _why[0]:
        with get_client(sync_client=True) as prefect:
            prefect.set_flow_run_state(flow_run.id, Crashed(message=_why[0]), force=True)


def cancel_tasks(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """A hook: what a cancelled run was about was cancelled too; Prefect says crashed, for the signal that its process got."""
    of_run = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
    ended = TaskRunFilter.model_validate({"state": {"type": {"any_": ["CRASHED", "RUNNING", "PENDING"]}}})
    with get_client(sync_client=True) as prefect:
        for task in prefect.read_task_runs(flow_run_filter=of_run, task_run_filter=ended, limit=MOST_TASKS):
            prefect.set_task_run_state(task.id, Cancelled(message=state.message), force=True)


def end_with_worker() -> None:
    """End this process as a cancellation would, once the worker that started it has died: nobody else could cancel it.

    Prefect is told, if it answers soon. Call it in a deployed flow run only.
    """
    parent, flow_run = os.getppid(), str(runtime.flow_run.id)
    # A worker of ours says who it is: it may have died while this process was starting.
    worker = int(os.environ.get(WORKER, parent))
    lives = worker in (parent, *ancestors())

    def watch() -> None:
        while lives and os.getppid() == parent and psutil.pid_exists(worker):
            time.sleep(WATCH_SECONDS)
        _why.append(WORKER_DIED)
        # In a thread of its own: a server that is silent must not keep the process alive.
        telling = threading.Thread(target=_tell, args=(flow_run,), daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch", daemon=True).start()


def _tell(flow_run: str) -> None:
    try:
        crash_flow_run(flow_run, WORKER_DIED)
    except Exception:
        log.exception("Prefect could not be told that the flow run %s ends", flow_run)
