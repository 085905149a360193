"""Who runs a flow run: noted where others find it, watched by itself, closed by the next start when it has died."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import psutil
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from diffusion.tracking.run import OWNER_TAG
from flows.progress import say

if TYPE_CHECKING:
    from mlflow import MlflowClient

WATCH_SECONDS = 3.0
ENDED = (StateType.CANCELLING, StateType.CANCELLED, StateType.CRASHED, StateType.FAILED, StateType.COMPLETED)


def boot_id() -> str:
    """What tells this boot of this machine from others: a pid means nothing after the next one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else f"{psutil.boot_time():.0f}"


def this_process() -> str:
    """This process, as text."""
    own = psutil.Process()
    known = {"host": socket.gethostname(), "boot": boot_id(), "pid": own.pid, "started": own.create_time()}
    return json.dumps(known, sort_keys=True)


def is_dead(owner: str) -> bool:
    """Whether a process is known to have ended: one of another machine never is."""
    told = json.loads(owner)
    if told["host"] != socket.gethostname():
        return False
    if told["boot"] != boot_id():
        return True
    try:
        process = psutil.Process(told["pid"])
        same = (
            abs(process.create_time() - told["started"]) < 5
        )  # the start is counted back from a clock that may be set
        return not same or process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def close_abandoned(client: MlflowClient, experiment_id: str, own_flow_run: str) -> list[str]:
    """Close the MLflow and Prefect runs that still say they run though their process here has died; returns their ids."""
    closed = []
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    for run in running:
        owner, flow_run = run.data.tags.get(OWNER_TAG), run.data.tags.get("prefect.flow_run_id", "")
        if owner is None or flow_run == own_flow_run or not is_dead(owner):
            continue
        told = json.loads(owner)
        reason = f"Its process {told['pid']} on {told['host']} ended without a word; found by flow run {own_flow_run}."
        client.set_tag(run.info.run_id, "failure", reason)
        client.set_terminated(run.info.run_id, "FAILED")
        _crash_flow_run(flow_run, reason)
        say(f"Closed the MLflow run {run.info.run_name}: {reason}")
        closed.append(run.info.run_id)
    return closed


def _crash_flow_run(flow_run: str, reason: str) -> None:
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as prefect:
        try:
            state = prefect.read_flow_run(UUID(flow_run)).state
            if state is None or state.type not in ENDED:
                prefect.set_flow_run_state(UUID(flow_run), Crashed(message=reason), force=True)
        except (ObjectNotFound, ValueError):  # of another server, or of a temporary one
            say(f"Prefect does not know the flow run {flow_run}.")


class Watch:
    """Ends this process as a cancellation would, when the worker that started it has died or its flow run is over.

    A dead worker can't cancel: the state would change and nothing end. Use it as a context, in a deployed flow run only.
    """

    def __init__(self) -> None:
        self._flow_run, self._parent = str(runtime.flow_run.id), os.getppid()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _loop(self) -> None:
        while not self._stop.wait(WATCH_SECONDS):
            if os.getppid() != self._parent:
                _crash_quietly(self._flow_run, "The worker that ran it has died.")
                return os.kill(os.getpid(), signal.SIGTERM)
            if self._is_over():
                return os.kill(os.getpid(), signal.SIGTERM)

    def _is_over(self) -> bool:
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(UUID(self._flow_run)).state
        except Exception:  # no answer is no news: the server may be restarting
            return False
        return state is not None and state.type in ENDED


def _crash_quietly(flow_run: str, reason: str) -> None:
    try:
        _crash_flow_run(flow_run, reason)
    except Exception as error:  # ending matters more than saying so
        say(f"Prefect could not be told that {flow_run} ends ({type(error).__name__}).")
