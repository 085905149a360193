"""Challenger against champion."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.tracking.registry import Decision, model_name
from diffusion.tracking.registry import promote as decide
from flows.run import Run
from flows.tasks.retrying import worth_retrying


@task(
    name="promote",
    task_run_name="promote version {version}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=worth_retrying,
)
def promote(run: Run, version: str) -> Decision:
    """Make the version champion if it is the first or its FID is lower; else it stays challenger."""
    return decide(run.tracked.client, model_name(run.dataset), version)
