"""Who runs a flow run: noted where others find it, ended with its worker, closed by the next start when it has died."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal
from uuid import UUID

import psutil
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import Abort
from prefect.states import Cancelled, Crashed, State
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion.errors import RunBusy, UserError
from diffusion.jobs.lock import LOCK, LOCK_SECONDS, lock_folder
from diffusion.jobs.started import is_same, started
from diffusion.tracking.run import OWNER_TAG, run_key
from diffusion.trust.private import read_private, write_private
from diffusion.trust.redaction import fit_to_leave, shown
from flows.progress import say

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

    from mlflow import MlflowClient

WATCH_SECONDS = 1.0
TELL_SECONDS = 3.0

log = logging.getLogger(__name__)


def boot_id() -> str:
    """What tells this boot of this machine from others: a pid means nothing after the next one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else f"{psutil.boot_time():.0f}"


class Owner(BaseModel):
    """A process, so that it is told from all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    boot: str
    pid: int = Field(gt=0, lt=2**31)
    started: float
    """Seconds after the machine's start."""


class Ending(BaseModel):
    """How a run ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["FINISHED", "FAILED", "KILLED"]
    reason: str = ""


ONLY_RUN = "stack/only-run"
"""In the home, what a deployed run locks."""
_held: list[IO[bytes]] = []
WORKER_DIED = "The worker that ran it has died."
_why: list[str] = []
"""Why this process ends, if it knows."""
MOST_TASKS = 200
FLOW_FOLDER = "flow"
"""Of a run's folder, what the flow locks; the folder itself is locked by its jobs."""
SILENT_SECONDS, SIGN_SECONDS = 240.0, 30.0
"""After so long without a sign of life a run of another machine is gone; and between two signs."""
ENDING = "ending.json"
"""In a run's folder, until MLflow knows how it ended."""


def note_ending(folder: Path, ending: Ending) -> None:
    """Keep how a run ended where the next start finds it; on a full disk, nowhere."""
    try:
        write_private(folder / ENDING, ending.model_dump_json())
    except OSError as error:
        log.warning("How the run ended can't be noted in %s (%s).", folder, error)


def this_process() -> str:
    """This process, as text."""
    known = Owner(host=socket.gethostname(), boot=boot_id(), pid=os.getpid(), started=started(os.getpid()))
    return json.dumps(known.model_dump(), sort_keys=True)


def read_owner(text: str | None) -> Owner | None:
    """The process that a tag names; None if it names none: tags can be written by others."""
    try:
        return Owner.model_validate_json(text or "")
    except ValidationError:
        return None


def is_dead(owner: Owner) -> bool:
    """Whether a process is known to have ended: one of another machine never is."""
    if owner.host != socket.gethostname():
        return False
    if owner.boot != boot_id():
        return True
    try:
        ended = psutil.Process(owner.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or not is_same(owner.pid, owner.started)
    except psutil.NoSuchProcess:
        return True


def is_gone(owner: Owner, folder: Path) -> bool:
    """Whether a process of another machine is known to have left its run's folder, which this one sees as well.

    Nobody holds the folder's lock then, and for some minutes nothing was written there. The lock alone would not do: some file systems
    keep locks to one machine.
    """
    lock, now = folder / FLOW_FOLDER / LOCK, folder / FLOW_FOLDER / f"now-{os.getpid()}"
    if owner.host == socket.gethostname() or not lock.exists():
        return False
    try:
        newest = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
        now.touch()
        asked = now.stat().st_mtime  # by the clock of whatever keeps the files
        now.unlink()
        if asked - newest < SILENT_SECONDS:
            return False
        with lock.open("r+b") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody holds it, or has just renamed what was looked at; or there are no locks here
        return False
    return True


@contextmanager
def signs_of_life(folder: Path) -> Iterator[None]:
    """Have a run's folder written to all the time, by which other machines see that this process lives."""
    ended = threading.Event()

    def sign() -> None:
        while not ended.wait(SIGN_SECONDS):
            with suppress(OSError):  # a file server that is away: the next one may reach it
                os.utime(folder / FLOW_FOLDER / LOCK)

    thread = threading.Thread(target=sign, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(SIGN_SECONDS)


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
        if owner is None or not (is_dead(owner) or (key and is_gone(owner, runs / key))):
            continue
        dead = f"Its process {owner.pid} on {owner.host} ended without a word; found by flow run {own_flow_run}."
        ending = _noted_ending(run, runs) or Ending(status="FAILED", reason=dead)
        if ending.reason:
            client.set_tag(run.info.run_id, "failure", fit_to_leave(ending.reason)[:5000])
        client.set_terminated(run.info.run_id, ending.status)
        if key:  # told: of the next attempt it would be false
            (runs / key / ENDING).unlink(missing_ok=True)
        if flow_run != own_flow_run and ending.reason == dead:
            _crash_flow_run(flow_run, dead)
        say(f"Closed the MLflow run {shown(str(run.info.run_name))}, {ending.status}. {ending.reason}")


def close_tasks_of_ended_runs() -> None:
    """Give tasks that say they run, though their flow run has ended, the end of that run: who was killed could not."""
    ours = FlowFilter.model_validate({"name": {"any_": ["train-diffusion"]}})  # the server may run flows of others
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


def _crash_flow_run(flow_run: str, reason: str) -> None:
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as prefect:
        try:
            state = prefect.read_flow_run(UUID(flow_run)).state
            if state is not None and state.type in (StateType.RUNNING, StateType.PENDING):
                prefect.set_flow_run_state(UUID(flow_run), Crashed(message=reason), force=True)
        except (ObjectNotFound, ValueError):  # of another server, or of a temporary one
            log.info("Prefect does not know the flow run %s", flow_run)


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

    def watch() -> None:
        while os.getppid() == parent:
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
        _crash_flow_run(flow_run, WORKER_DIED)
    except Exception:
        log.exception("Prefect could not be told that the flow run %s ends", flow_run)
