"""Challenger against champion."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import NAMESPACE_URL, uuid5

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from diffusion.errors import CheckpointDamaged, DataError, RecipeError
from diffusion.jobs.specs import EvaluationJob
from diffusion.tracking.promotion import CHAMPION, Decision, Scored, champion_version, decide
from diffusion.tracking.scores_tag import scores_of
from diffusion.tracking.version_tags import checkpoint_of
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.rescoring import score_as
from flows.run import Run, note_code, run_phase
from flows.tasks.retrying import RETRIED

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PROMOTED = "train-diffusion.promoted"
"""The event by which others hear of it."""


@task(
    name="promote",
    task_run_name="promote version {version}",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def promote(run: Run, model: str, version: str, workers: Workers) -> Decision:
    """Make the version champion if it passes all gates; else it stays challenger. The record is a table of the run."""
    client, store, margins = run.tracked.client, run.store, run.request.margins
    decision = decide(client, store, model, version, margins, lambda champion: score_again(run, champion, workers))
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


def score_again(run: Run, champion: ModelVersion, workers: Workers) -> Scored:
    """Score the champion by this run's protocol on this run's images, once.

    Raises DataError if its checkpoint is gone, or what it draws is of another kind.
    """
    try:
        state = checkpoint_of(champion, run.store)
    except (RecipeError, CheckpointDamaged) as error:
        raise DataError(str(error)) from None
    before = scores_of(champion, run.store)

    def start(spec: EvaluationJob) -> None:
        note_code(run)
        title = f"Scoring version {champion.version}, the champion, as this one was"
        job = Job(spec, run.folder / "champion", "evaluation")
        run_phase(title, "score-champion", job, workers, run.recipe)

    return score_as(state, run.recipe, run.dataset, before.weights if before else None, run.settings, start)
