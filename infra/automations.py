"""The automations of the Prefect server: python infra/automations.py, with the server's address and credentials in the environment.

Zombie runs: a flow run that beat and then fell silent is marked as crashed. So a run whose machine is gone does not block
the next night's, and whoever is notified of crashes hears of it.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

from prefect.automations import Automation
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

ZOMBIES = "train-diffusion: mark silent runs as crashed"
SILENCE = timedelta(seconds=90)  # three heartbeats, of 30 s each (pyproject.toml)


def zombies() -> Automation:
    """The automation that catches runs whose process is gone."""
    beat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    trigger = EventTrigger(
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
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


async def main() -> None:
    """Make the automations that are not there. Those that are stay: with them the server would forget whom it listens for."""
    for automation in (zombies(),):
        try:
            await Automation.aread(name=automation.name)
        except ValueError:
            await automation.acreate()
            print(f"made '{automation.name}'")


if __name__ == "__main__":
    asyncio.run(main())
