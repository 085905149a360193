"""A deployment's one slot: a run that nobody starts gives it back, and one that lives keeps it, whatever the server takes it for."""

from __future__ import annotations

import sys

import pytest

from tests.running import wait_for_message
from tests.stack import Project

pytestmark = pytest.mark.slow

NEVER_STARTED = """
import asyncio, sys, time
from datetime import timedelta
from prefect import get_client
from prefect.states import Completed, Pending, Running
sys.path.insert(0, "infra")
import automations
(ours,) = [one for one in automations.zombies() if one.name == automations.NEVER_STARTED]
soon = ours.model_copy(update={"name": "tried", "trigger": ours.trigger.model_copy(update={"within": timedelta(seconds=30)})})
async def main():
    async with get_client() as client:
        known = {one.name: one for one in await client.read_automations()}
        assert known[ours.name].trigger.model_dump(exclude={"id"}) == ours.trigger.model_dump(exclude={"id"}), "it is in use"
        deployment = await client.read_deployment_by_name("train-diffusion/train-diffusion")
        made = await client.create_automation(soon)
        async def state(run):
            return (await client.read_flow_run(run.id)).state
        # One that is started in time; without the deployment, whose only slot the other has.
        asked = {"flow_id": str(deployment.flow_id), "state": {"type": "PENDING"}}
        begun = await client.read_flow_run((await client.request("POST", "/flow_runs/", json=asked)).json()["id"])
        # Prefect loses, for a quarter of an hour, an event that comes in the moment that the one before it is done with.
        await asyncio.sleep(5)
        await client.set_flow_run_state(begun.id, Running())
        left = await client.create_flow_run_from_deployment(deployment.id, state=Pending())
        deadline = time.monotonic() + 900
        while (await state(left)).name == "Pending" and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        print((await state(begun)).name)
        await client.set_flow_run_state(begun.id, Completed())
        print((await state(left)).name, (await state(left)).message)
        await client.delete_automation(made)
        limit = await client.read_global_concurrency_limit_by_name(f"deployment:{deployment.id}")
        print(limit.active_slots)
asyncio.run(main())
"""


def test_a_run_that_was_taken_and_never_started_is_crashed_told_and_gives_its_slot_back(
    project: Project, received: list[dict[str, str]]
) -> None:
    """By the automation that is in use, but for its patience."""
    done = project.shell(sys.executable, "-c", NEVER_STARTED, env=project.servers)
    never = "Taken by a worker, and not started within 10 minutes: the worker, or its machine, is gone."
    assert done.stdout.splitlines() == ["Running", f"Crashed {never}", "0"], done.stdout + done.stderr[-2000:]
    wait_for_message(received, never)


SLOT = """
import os, threading, time
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.flow_engine import run_flow
from prefect.states import Crashed, Pending
import flows.slot
os.umask(0o077)
others = []
flows.slot.RENEW_SECONDS = 0.3
flows.slot.keep_slots()
client = get_client(sync_client=True)
with client:
    deployment = client.read_deployment_by_name("train-diffusion/train-diffusion")
    limit = f"deployment:{deployment.id}"

    def wait_until(what):
        deadline = time.monotonic() + 900
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def pending():
        pause(True)  # or the worker would be the first to take it
        try:
            run = client.create_flow_run_from_deployment(deployment.id)
            client.set_flow_run_state(run.id, Pending())
        finally:
            pause(False)
        return client.read_flow_run(run.id)

    def pause(paused):
        client.update_work_pool(deployment.work_pool_name, WorkPoolUpdate(is_paused=paused))

    def held():
        return client.read_global_concurrency_limit_by_name(limit).active_slots

    @flow
    def tried(start_from):
        run = runtime.flow_run.id
        print("threads", sorted(t.name for t in threading.enumerate() if t.name == "slot" or "lease" in t.name), held())
        silent = Crashed(message=f"{flows.slot.NO_HEARTBEAT} for 90 s")
        client.set_flow_run_state(run, silent, force=True)
        wait_until(lambda: client.read_flow_run(run).state_name == "Running")
        print("alone", client.read_flow_run(run).state.message, held())
        while not others:  # until another run is the first to take the slot
            client.set_flow_run_state(run, silent, force=True)
            try:
                taken = client.increment_concurrency_slots_with_lease([limit], 1, "concurrency", 600)
            except PrefectHTTPStatusError as error:
                assert error.response.status_code == 423
            else:
                others.append(taken.json()["lease_id"])
        time.sleep(2)
        print("beside another", client.read_flow_run(run).state_name, held())

    begun = pending()
    run_flow(tried, flow_run=begun, parameters={})
    print("at the end", client.read_flow_run(begun.id).state_name, held())
    client.release_concurrency_slots_with_lease(others[0])

    looked = threading.Event()

    def late(keeper, run, take=flows.slot._take_slot):
        flows.slot.RENEW_SECONDS = 60
        looked.set()
        wait_until(lambda: client.read_flow_run(run).state_name == "Completed")
        return take(keeper, run)

    @flow
    def short(start_from):
        flows.slot._take_slot = late
        client.set_flow_run_state(runtime.flow_run.id, Crashed(message=flows.slot.NOT_STARTED), force=True)
        assert looked.wait(900)

    begun = pending()
    run_flow(short, flow_run=begun, parameters={})
    print("ended meanwhile", client.read_flow_run(begun.id).state_name, held())
"""


def test_a_run_keeps_its_slot_and_says_that_it_lives_when_the_server_takes_it_for_dead(project: Project) -> None:
    """Prefect's own way, which ends a run whose server is away, is not in use."""
    done = project.shell(sys.executable, "-c", SLOT, env=project.servers)
    assert done.stdout.splitlines() == [
        "threads ['slot'] 1",
        "alone It was taken for dead while the server was away, and lives. 1",
        "beside another Crashed 1",
        "at the end Completed 1",
        "ended meanwhile Completed 0",
    ], done.stderr[-2000:]
