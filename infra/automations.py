"""What the Prefect server must know before `prefect deploy --all`: python infra/automations.py, with its address and credentials in
the environment. The work pool of prefect.yaml, the automations, this package's types of blocks, the page of the recipe.

Zombie runs: a flow run that beat and then fell silent, or that a worker took and never started, is marked as crashed. So a run
whose machine is gone does not block the next night's, and whoever is notified of crashes hears of it.

Notifications: a flow run that failed or crashed, a night that was not run because another run was under way, and a promotion
are told to the notification blocks of Prefect that TRAIN_DIFFUSION_NOTIFY names, as type/name: slack-webhook/ops,smtp-mail/ops.
Others that it named before are told no more; with none, nobody is; where it is not set, all stays as it is.

Automations and deployments that earlier versions had are deleted.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from prefect import get_client
from prefect.automations import Automation, AutomationCore
from prefect.client.schemas.actions import ArtifactCreate, WorkPoolCreate
from prefect.client.schemas.filters import ArtifactCollectionFilter, ArtifactCollectionFilterKey
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.workers.process import ProcessWorker

from diffusion.presentation.recipe_page import recipe_page
from diffusion.settings import settings
from flows.nights import BY_SCHEDULE
from flows.plugins.credentials import S3Credentials
from flows.plugins.mail import SmtpMail
from flows.slot import NO_HEARTBEAT, NOT_STARTED

WORK_POOL = "train-diffusion"
OWN = "train-diffusion: "  # how the names of these automations begin
ZOMBIES = f"{OWN}mark silent runs as crashed"
TELL = f"{OWN}tell "
NOBODY = ("none",)  # as TRAIN_DIFFUSION_NOTIFY
NEVER_STARTED = f"{OWN}mark runs that never started as crashed"
PROMOTED = "train-diffusion.promoted"  # the event of flows/tasks/promote.py
OF_THE_FLOWS: dict[str, str | list[str]] = {
    "prefect.resource.role": "flow",
    "prefect.resource.name": ["train-diffusion", "clean-up"],
}
"""Whose events these automations listen to: the server may run flows of others."""
FLOW_RUNS: dict[str, str | list[str]] = {"prefect.resource.id": "prefect.flow-run.*"}
RECIPE = "recipe"  # of prefect.yaml's links
RETIRED = ("train-diffusion/nightly",)  # now a schedule of train-diffusion/train-diffusion
SILENCE = timedelta(seconds=90)  # three heartbeats, of 30 s each (pyproject.toml)
START = timedelta(minutes=10)
"""From taking a run to its first state: seconds, but on a busy machine. Prefect holds its slot as long (prefect.yaml)."""
ONCE = timedelta(minutes=10)
"""A run that has failed may be called crashed as well by whoever finds it dead: so long it is one failure."""
LATE = timedelta(hours=1)
"""After which a run that no worker has taken is told of."""
TAKEN = ("Pending", "Submitting", "InfrastructurePending")
STARTED = ("Running", "Retrying", "AwaitingRetry", "Cancelling", "Completed", "Failed", "Cancelled", "Crashed")


def events(*states: str) -> set[str]:
    """That a flow run came into these states."""
    return {f"prefect.flow-run.{state}" for state in states}


def crash_unless(name: str, after: set[str], expect: set[str], within: timedelta, message: str) -> AutomationCore:
    """The automation that ends runs of which nothing more is heard."""
    trigger = EventTrigger(
        match=ResourceSpecification(FLOW_RUNS),
        match_related=ResourceSpecification(OF_THE_FLOWS),
        after=after,
        expect=expect,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )
    crash = ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=message, force=False)
    return AutomationCore(name=name, description=__doc__ or "", trigger=trigger, actions=[crash])


def zombies() -> list[AutomationCore]:
    """The automations that catch runs whose process is gone, or never was."""
    beat = events("heartbeat")
    ends = events("Completed", "Failed", "Cancelled", "Crashed")
    silent = f"{NO_HEARTBEAT} for {SILENCE.seconds} s: its process is gone."
    never = f"{NOT_STARTED} within {START.seconds // 60} minutes: the worker, or its machine, is gone."
    return [
        crash_unless(ZOMBIES, beat, beat | ends, SILENCE, silent),
        crash_unless(NEVER_STARTED, events(*TAKEN), events(*STARTED), START, never),
    ]


def notifications(block: str, block_id: UUID) -> list[AutomationCore]:
    """The automations that tell a block of failures, of runs that were left out or that nobody takes, and of promotions."""
    of_the_flows = ResourceSpecification(OF_THE_FLOWS)
    night = ResourceSpecification({"prefect.resource.id": f"prefect.tag.{BY_SCHEDULE}"})
    failure = EventTrigger(
        expect=events("Failed", "Crashed"), match_related=of_the_flows, for_each={"prefect.resource.id"}, within=ONCE
    )
    # What Prefect says when the deployment's only slot is taken, with CANCEL_NEW.
    left_out = EventTrigger(
        match=ResourceSpecification(FLOW_RUNS | {"prefect.state-message": "Deployment concurrency limit reached*"}),
        match_related=[of_the_flows, night],
        expect=events("Cancelled"),
    )
    promotion = EventTrigger(expect={PROMOTED})
    # Its worker, which would have taken it, has ended, or the server has forgotten it.
    not_begun = EventTrigger(
        match=ResourceSpecification(FLOW_RUNS),
        match_related=of_the_flows,
        after=events("Late"),
        expect=events(*TAKEN, *STARTED),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=LATE,
    )
    link = "{{ flow_run|ui_url }}"
    told = {
        "failures": (
            failure,
            "{{ flow_run.name }}: {{ flow_run.state.name }}",
            "{{ flow_run.state.message }}\n" + link,
        ),
        "nights left out": (
            left_out,
            "A scheduled run was left out",
            "{{ flow_run.name }}, due {{ flow_run.expected_start_time }}: another run of its deployment was under way.\n"
            + link,
        ),
        "runs that nobody takes": (
            not_begun,
            "A run has not begun",
            "{{ flow_run.name }}, due {{ flow_run.expected_start_time }}, waits for a worker: does one run?\n" + link,
        ),
        "promotions": (promotion, "A new model is live", "{{ event.payload['text'] }}"),
    }
    return [
        AutomationCore(
            name=f"{TELL}{block} of {what}",
            description=__doc__ or "",
            trigger=trigger,
            actions=[SendNotification(block_document_id=block_id, subject=subject, body=body)],
        )
        for what, (trigger, subject, body) in told.items()
    ]


async def find_block(block: str) -> UUID | None:
    """The id of a block. None, which is said, if there is none: at a start by night, all else is to go on."""
    kind, _, name = block.partition("/")
    async with get_client() as client:
        try:
            return (await client.read_block_document_by_name(name, kind)).id
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code >= 500:
                raise
            print(
                f"WARNING: TRAIN_DIFFUSION_NOTIFY names the block '{block}', which Prefect does not have: nobody is told by it. Make "
                "it on the Blocks page of Prefect's UI (prefect block ls lists them as type/name), then make up again."
            )
            return None


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


async def tell_edited_schedules() -> None:
    """Say which schedules were edited in the page: what follows, `prefect deploy --all`, takes them from prefect.yaml again."""
    import yaml

    file = Path(__file__).resolve().parent.parent / "prefect.yaml"
    async with get_client() as client:
        for planned in yaml.safe_load(file.read_text(encoding="utf-8"))["deployments"]:
            try:
                there = await client.read_deployment_by_name(f"{planned['name']}/{planned['name']}")
            except ObjectNotFound:
                continue
            now = {
                (one.slug, getattr(one.schedule, "cron", None), getattr(one.schedule, "timezone", None))
                for one in there.schedules
            }
            wanted = {(one["slug"], one["cron"], one["timezone"]) for one in planned["schedules"]}
            for slug, cron, timezone in sorted(now - wanted, key=str):
                edited = f"The schedule {slug or '(added by hand)'} of {planned['name']}, edited to '{cron}' {timezone or ''},"
                print(f"{edited} goes back to what prefect.yaml says: write it there.")


async def make_work_pool() -> None:
    """The pool that the deployments name, of processes on the worker's machine."""
    pool = WorkPoolCreate(
        name=WORK_POOL, type="process", base_job_template=ProcessWorker.get_default_base_job_template()
    )
    async with get_client() as client:
        await client.create_work_pool(pool, overwrite=True)


async def show_recipe() -> None:
    """Every value of a recipe with its meaning, as an artifact, to which the deployment's description leads."""
    of_it = ArtifactCollectionFilter(key=ArtifactCollectionFilterKey(any_=[RECIPE]))
    async with get_client() as client:
        newest = await client.read_latest_artifacts(artifact_filter=of_it)
        if not newest or newest[0].description != recipe_page():
            # The page of a key shows the descriptions of its artifacts; their data is one click further away.
            made = ArtifactCreate(key=RECIPE, type="markdown", description=recipe_page(), data="As described.")
            await client.create_artifact(made)


async def main() -> None:
    """Make the automations that are not there, renew those that differ, delete those that are wanted no more.

    Others stay as they are: a new one would not know whom it listens for.
    """
    await make_work_pool()
    for block_type in (S3Credentials, SmtpMail):
        await block_type.register_type_and_schema()
    await show_recipe()
    await remove_retired()
    await tell_edited_schedules()
    wanted, blocks = zombies(), settings().notify
    for block in blocks if blocks != NOBODY else ():
        if (found := await find_block(block)) is not None:
            wanted += notifications(block, found)
    async with get_client() as client:
        known = {one.name: one for one in await client.read_automations() if one.name.startswith(OWN)}
        if not blocks:  # it may only have been left out of this command
            known = {name: one for name, one in known.items() if not name.startswith(TELL)}
        for automation in wanted:
            there = known.pop(automation.name, None)
            if there is None:
                await client.create_automation(automation)
                print(f"made '{automation.name}'")
            elif meaning(there) != meaning(automation):
                automation.enabled = there.enabled  # whoever switched it off meant it
                await Automation(id=there.id, **automation.model_dump()).aupdate()
                print(f"renewed '{automation.name}'")
        for left in known.values():
            await client.delete_automation(left.id)
            print(f"deleted '{left.name}'")


def meaning(automation: AutomationCore) -> dict[str, object]:
    """What an automation does, without what the server adds."""
    return automation.model_dump(include={"trigger", "actions"})


if __name__ == "__main__":
    asyncio.run(main())
