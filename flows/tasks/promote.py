"""Challenger against champion."""

from __future__ import annotations

from uuid import NAMESPACE_URL, uuid5

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from diffusion.tracking.gates import Margins
from diffusion.tracking.promotion import CHAMPION, Decision, champion_version
from diffusion.tracking.promotion import promote as decide
from diffusion.tracking.registry import model_name
from flows.run import Run
from flows.tasks.retrying import RETRIED

PROMOTED = "train-diffusion.promoted"
"""The event by which others hear of it."""


@task(
    name="promote",
    task_run_name="promote version {version}",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def promote(run: Run, version: str) -> Decision:
    """Make the version champion if it passes all gates; else it stays challenger. The record is a table of the run."""
    margins = Margins(run.request.fid_margin, run.request.bits_margin)
    decision = decide(run.tracked.client, run.store, model_name(run.dataset), version, margins)
    run.tracked.log_decision(decision)
    champion = champion_version(run.tracked.client, decision.model)
    # A retry may come after a way back to an older version, which is not the time to tell.
    if decision.alias == CHAMPION and champion is not None and int(champion.version) >= int(version):
        emit_event(
            PROMOTED,
            resource={"prefect.resource.id": f"train-diffusion.model.{decision.model}"},
            payload={"text": f"{decision.model} {decision.version} is champion. {decision.reason}"},
            id=uuid5(NAMESPACE_URL, f"{run.tracked.run_id}/{decision.version}"),  # a retry's is the same event
        )
    return decision
