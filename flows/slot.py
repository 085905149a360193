"""A flow run keeps its deployment's only slot for as long as it lives, also while the Prefect server is away.

Prefect lends a slot for five minutes, asks for more of it every 225 s, and ends the run if the server does not answer then, or has
given the slot away meanwhile: an outage of seconds at the wrong moment, or of minutes at any. Here the server is asked every half
minute, for an hour, and a run whose server is away goes on. Whoever is known to be dead gives its slot back: its state says so.

A server that comes back takes a run for dead that it has not heard of (infra/automations.py), before it listens. The run says that it
lives, and takes its slot again; if another has it by then, it goes on without.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import prefect.flow_engine
from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateDetails, StateType
from prefect.exceptions import PrefectHTTPStatusError

log = logging.getLogger(__name__)

LEASE_SECONDS = 3600.0
RENEW_SECONDS = 30.0
GONE, LOCKED = 410, 423
NO_HEARTBEAT = "No heartbeat"
NOT_STARTED = "Taken by a worker, and not started"
TAKEN_FOR_DEAD = (NO_HEARTBEAT, NOT_STARTED)
"""How the message of a state begins that was given to a run that was not heard of, or whose beginning the server missed."""


@contextmanager
def kept_slot(lease: UUID, *_: Any, **__: Any) -> Iterator[None]:
    """In place of Prefect's own: keep the slot in the background until the run ends, and never end the run."""
    ended, run = threading.Event(), UUID(str(runtime.flow_run.id))

    def keep() -> None:
        held: UUID | None = lease
        with get_client(sync_client=True) as client:
            while not ended.is_set():
                try:
                    if _is_taken_for_dead(client, run):
                        before, held = held, _take_slot(client, run)
                        if held is not None and not _is_taken_for_dead(client, run):  # it has ended meanwhile
                            client.release_concurrency_slots_with_lease(held)
                            held = None
                        elif held is not None:
                            _say_that_it_lives(client, run, held)
                        elif before is not None:
                            log.warning(
                                "Another run began while the server took this one for dead, which goes on to its end."
                            )
                    elif held is not None:
                        client.renew_concurrency_lease(lease_id=held, lease_duration=LEASE_SECONDS)
                except PrefectHTTPStatusError as error:
                    if error.response.status_code == GONE:
                        held = None
                    log.warning("The slot of this run was not renewed (%s).", error.response.status_code)
                except Exception as error:  # however the server is away
                    log.warning("The slot of this run was not renewed (%s).", type(error).__name__)
                ended.wait(RENEW_SECONDS)

    keeper = threading.Thread(target=keep, name="slot", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        keeper.join(RENEW_SECONDS)  # or the process could end when it has just taken the slot, which nobody gives back


def _is_taken_for_dead(client: SyncPrefectClient, run: UUID) -> bool:
    state = client.read_flow_run(run).state
    return state is not None and state.type == StateType.CRASHED and (state.message or "").startswith(TAKEN_FOR_DEAD)


def _take_slot(client: SyncPrefectClient, run: UUID) -> UUID | None:
    """The slot's lease; None if another run has it."""
    name = f"deployment:{client.read_flow_run(run).deployment_id}"
    try:
        answer = client.increment_concurrency_slots_with_lease([name], 1, "concurrency", LEASE_SECONDS)
    except PrefectHTTPStatusError as error:
        if error.response.status_code == LOCKED:
            return None
        raise
    return UUID(answer.json()["lease_id"])


def _say_that_it_lives(client: SyncPrefectClient, run: UUID, lease: UUID) -> None:
    message = "It was taken for dead while the server was away, and lives."
    details = StateDetails(flow_run_id=run, deployment_concurrency_lease_id=lease)
    client.set_flow_run_state(
        run, State(type=StateType.RUNNING, name="Running", message=message, state_details=details), force=True
    )
    log.warning("The server took this run for dead; it lives.")


def keep_slots() -> None:
    """Have Prefect's engine in this process keep slots so. It takes its slot before a flow's first line: call it on import."""
    prefect.flow_engine.maintain_concurrency_lease = kept_slot  # type: ignore[assignment]
