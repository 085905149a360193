"""What the Prefect server must know before `prefect deploy --all`: python infra/automations.py, with its address and credentials in
the environment. The work pool of prefect.yaml, the automations, this package's types of blocks.

Zombie runs: a flow run that beat and then fell silent is marked as crashed. So a run whose machine is gone does not block
the next night's, and whoever is notified of crashes hears of it.

Notifications: a flow run that failed or crashed, and a promotion, are told to the notification blocks of Prefect that
TRAIN_DIFFUSION_NOTIFY names, as type/name: slack-webhook/ops,smtp-mail/ops.

Deployments that earlier versions had are deleted.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from prefect import get_client
from prefect.automations import Automation
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from diffusion.settings import settings
from flows.credentials import S3Credentials
from flows.mail import SmtpMail

WORK_POOL = "train-diffusion"
ZOMBIES = "train-diffusion: mark silent runs as crashed"
PROMOTED = "train-diffusion.promoted"  # the event of flows/tasks/promote.py
OF_THE_FLOWS: dict[str, str | list[str]] = {
    "prefect.resource.role": "flow",
    "prefect.resource.name": ["train-diffusion", "clean-up"],
}
"""Whose events these automations listen to: the server may run flows of others."""
RETIRED = ("train-diffusion/nightly",)  # now a schedule of train-diffusion/train-diffusion
SILENCE = timedelta(seconds=90)  # three heartbeats, of 30 s each (pyproject.toml)


def zombies() -> Automation:
    """The automation that catches runs whose process is gone."""
    beat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        match_related=ResourceSpecification(OF_THE_FLOWS),
        after={beat},
        expect={beat, *ends},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=SILENCE,
    )
    crash = ChangeFlowRunState(
        name="Crashed",
        state=StateType.CRASHED,
        message=f"No heartbeat for {SILENCE.seconds} s: its process is gone.",
        force=False,
    )
    return Automation(name=ZOMBIES, description=__doc__ or "", trigger=trigger, actions=[crash])


def notifications(block: str, block_id: UUID) -> list[Automation]:
    """The automations that tell a block of failures and of promotions."""
    failure = EventTrigger(
        expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
        match_related=ResourceSpecification(OF_THE_FLOWS),
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )
    promotion = EventTrigger(expect={PROMOTED}, posture=Posture.Reactive, threshold=1, within=timedelta(0))
    told = {
        "failures": (
            failure,
            "{{ flow_run.name }}: {{ flow_run.state.name }}",
            "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
        ),
        "promotions": (promotion, "A new model is live", "{{ event.payload['text'] }}"),
    }
    return [
        Automation(
            name=f"train-diffusion: tell {block} of {what}",
            description=__doc__ or "",
            trigger=trigger,
            actions=[SendNotification(block_document_id=block_id, subject=subject, body=body)],
        )
        for what, (trigger, subject, body) in told.items()
    ]


async def find_block(block: str) -> UUID:
    """The id of a block. Ends with a sentence if there is none."""
    kind, _, name = block.partition("/")
    async with get_client() as client:
        try:
            return (await client.read_block_document_by_name(name, kind)).id
        except Exception as error:
            raise SystemExit(
                f"TRAIN_DIFFUSION_NOTIFY names the block '{block}', which Prefect does not have ({type(error).__name__}). Make it "
                "on the Blocks page of Prefect's UI; prefect block ls lists them as type/name."
            ) from None


async def remove_retired() -> None:
    """Delete the deployments that earlier versions had: their schedules would go on."""
    async with get_client() as client:
        for name in RETIRED:
            try:
                deployment = await client.read_deployment_by_name(name)
            except ObjectNotFound:
                continue
            await client.delete_deployment(deployment.id)
            print(f"deleted the deployment {name}, which prefect.yaml has no more")


async def make_work_pool() -> None:
    """The pool that the deployments name, of processes on the worker's machine."""
    pool = WorkPoolCreate(
        name=WORK_POOL, type="process", base_job_template=ProcessWorker.get_default_base_job_template()
    )
    async with get_client() as client:
        await client.create_work_pool(pool, overwrite=True)


async def main() -> None:
    """Make the automations that are not there. Those that are stay: with them the server would forget whom it listens for."""
    await make_work_pool()
    for block_type in (S3Credentials, SmtpMail):
        await block_type.register_type_and_schema()
    await remove_retired()
    wanted = [zombies()]
    for block in settings().notify:
        wanted += notifications(block, await find_block(block))
    for automation in wanted:
        try:
            known = await Automation.aread(name=automation.name)
        except ValueError:
            known = None
        if known is not None and _block_of(known) != _block_of(automation):  # the block was made anew
            await known.adelete()
            known = None
        if known is None:
            await automation.acreate()
            print(f"made '{automation.name}'")


def _block_of(automation: Automation) -> UUID | None:
    (action,) = automation.actions
    return action.block_document_id if isinstance(action, SendNotification) else None


if __name__ == "__main__":
    asyncio.run(main())
