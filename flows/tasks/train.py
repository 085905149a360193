"""Checkpoint -> the checkpoint at the next milestone."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from diffusion.jobs.specs import TrainingJob
from diffusion.presentation.plots import gradient_norms, loss_by_noise_level
from diffusion.training.journal import JOURNAL, Journal, commit, committed_step, records
from diffusion.training.state import CheckpointState, checkpoint_file, is_whole, load_state
from flows.engines.engine import Job
from flows.engines.placement import Workers
from flows.request import checkpoint_every
from flows.run import Run, note_code, run_phase
from flows.tasks.retrying import RETRIED


@task(
    name="train",
    task_run_name="train to step {until}",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def train(run: Run, until: int, workers: Workers) -> CheckpointState:
    """Train to step `until`, from the run's newest checkpoint."""
    if not is_whole(run.store, run.key, until):
        note_code(run)
        spec = TrainingJob(
            **run.job_fields(), recipe=run.recipe, until=until, checkpoint_every=checkpoint_every(run.recipe)
        )
        title = f"Training to step {until:,} of {run.recipe.total_steps:,}"
        job = Job(spec, run.folder, "training")
        run_phase(title, f"train-{until}", job, workers, run.recipe)
    state = load_state(run.store, run.key, until)
    if committed_step(run.folder) < until:
        # Whoever wrote the checkpoint did not come to say so here: it died, or it was another machine.
        Journal(run.folder / JOURNAL).roll_back(checkpoint_file(run.store, state, JOURNAL))
        commit(run.folder, until)
    run.sender.flush()
    journal = run.folder / JOURNAL
    if journal.exists():
        course = records(journal.read_bytes())
        run.tracked.log_figure(loss_by_noise_level(course), "figures/loss_by_noise_level.png")
        run.tracked.log_figure(gradient_norms(course), "figures/gradient_norms.png")
        run.tracked.client.log_artifact(run.tracked.run_id, str(journal))
    return state
