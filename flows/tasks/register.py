"""Checkpoint -> model version."""

from __future__ import annotations

from statistics import harmonic_mean

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.evaluation.scores import Scores
from diffusion.tracking.registry import Candidate, publish
from diffusion.tracking.version_tags import EARLIER_COMMITS
from diffusion.training.state import CheckpointState
from flows.engines.known import engine
from flows.engines.placement import Workers
from flows.run import Run, note_code
from flows.tasks.evaluate import evaluation_picture
from flows.tasks.retrying import RETRIED


@task(
    name="register",
    task_run_name="register step {state.step}",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def register(run: Run, state: CheckpointState, scores: Scores, workers: Workers) -> tuple[str, str]:
    """Make a model version of the checkpoint, with its lineage, and return the model's name and the version's number."""
    note_code(run)  # the version has it in it
    tags = {
        "git.commit": run.tracked.commit,
        "prefect.flow_run_id": run.lineage.flow_run_id,
    }
    if run.tracked.earlier_commits:
        tags[EARLIER_COMMITS] = run.tracked.earlier_commits
    pictures = {name: evaluation_picture(run, state.step, name) for name in ("grid", "closest")}
    made = Candidate(state, scores, run.dataset, pictures, tags, compute(run, state, workers))
    return publish(run.tracked, run.store, made)


def compute(run: Run, state: CheckpointState, workers: Workers) -> str:
    """What the training took, for the card."""
    where = engine().described(workers)
    points = run.tracked.client.get_metric_history(run.tracked.run_id, "speed/images_per_second")
    images = state.images_seen - run.recipe.first_step * run.recipe.data.batch_size
    took = ""
    if points:  # each of as many images
        speed = harmonic_mean([point.value for point in points])
        minutes = images / speed / 60
        took = f", about {f'{minutes:.0f} minutes' if minutes < 120 else f'{minutes / 60:.1f} hours'} at {speed:,.0f} images/s"
    return f"{images:,} images on {where}{took}; {run.recipe.precision}, reduction {run.recipe.reduction}."
