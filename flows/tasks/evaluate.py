"""Checkpoint -> scores and a grid of samples."""

from __future__ import annotations

import base64

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from diffusion.errors import DataError
from diffusion.evaluation.comparison import load_evidence
from diffusion.evaluation.figures import headline
from diffusion.evaluation.pictures import grid_caption, thumbnail
from diffusion.evaluation.protocol import PROTOCOL
from diffusion.evaluation.scores import Scores, find_scores
from diffusion.jobs.specs import EvaluationJob
from diffusion.store import layout
from diffusion.training.state import CheckpointState
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.progress import show
from flows.run import Run, note_code, run_phase
from flows.tasks.retrying import RETRIED

GRID_PIXELS = 700  # in Prefect, which keeps pictures in its database


@task(
    name="evaluate",
    task_run_name="evaluate step {state.step}",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def evaluate(run: Run, state: CheckpointState, workers: Workers) -> Scores:
    """Sample from the checkpoint and score the samples; log scores and grid to MLflow, show the grid in Prefect."""
    step, samples = state.step, run.recipe.evaluation.samples
    scores = _found(run, state)
    if scores is None:
        note_code(run)
        spec = EvaluationJob(**run.job_fields(), step=step, inception=run.settings.inception)
        folder = run.folder / f"evaluation-{step:09d}"
        title = f"Evaluating step {step:,} ({samples:,} samples)"
        job = Job(spec, folder, "evaluation")
        run_phase(title, f"evaluate-{step}", job, workers, run.recipe)
        scores = find_scores(run.store, run.key, step, samples, checkpoint=state.digest)
        assert scores is not None
    grid = evaluation_picture(run, step, "grid")
    if step == run.recipe.milestones[0]:
        # MLflow's slider begins at 0.
        run.tracked.log_image("samples", 0, evaluation_picture(run, step, "noise"))
    run.tracked.log_scores(scores, grid, evaluation_picture(run, step, "closest"), evaluations(run, step))
    at = f"Step {step:,}, {state.images_seen:,} images seen"
    show(f"{at}.", f"# {runtime.flow_run.name}\n\n{at}: {headline(scores)}\n\n{grid_for_prefect(run, step)}\n")
    return scores


def _found(run: Run, state: CheckpointState) -> Scores | None:
    """An evaluation that was made before, by today's protocol and with all that it leaves: clean-up keeps figures alone."""
    step = state.step
    scores = find_scores(run.store, run.key, step, run.recipe.evaluation.samples, checkpoint=state.digest)
    if scores is None or scores.protocol != PROTOCOL:
        return None
    try:
        for name in ("grid", "closest", *(["noise"] if step == run.recipe.milestones[0] else [])):
            evaluation_picture(run, step, name)
        if scores.evidence_sha256 is not None:
            load_evidence(run.store, run.key, scores)
    except (KeyError, DataError):
        return None
    return scores


def grid_for_prefect(run: Run, step: int) -> str:
    """The samples of a step, as Markdown."""
    grid = base64.b64encode(thumbnail(evaluation_picture(run, step, "grid"), GRID_PIXELS)).decode()
    caption = grid_caption(run.dataset.images, run.recipe.network.class_conditional)
    return f"![{caption}](data:image/webp;base64,{grid})"


def evaluations(run: Run, until: int) -> list[Scores]:
    """The run's evaluations up to a step, in their order."""
    steps = [step for step in run.recipe.milestones if step <= until]
    found = [find_scores(run.store, run.key, step, run.recipe.evaluation.samples) for step in steps]
    return [scores for scores in found if scores is not None]


def evaluation_picture(run: Run, step: int, name: str) -> bytes:
    """A picture of an evaluation (`grid`, `closest`, …), as PNG."""
    return run.store.read(layout.picture(run.key, step, name))
