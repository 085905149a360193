"""The run: what the tasks of one flow run share, from the MLflow run to the working folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client

from diffusion.data.manifest import Manifest
from diffusion.errors import RunBusy
from diffusion.jobs.lock import lock_folder
from diffusion.recipe import Recipe
from diffusion.settings import Settings, settings
from diffusion.store.objects import Store, open_store
from diffusion.tracking.connection import when_it_answers
from diffusion.tracking.experiment import open_tracking
from diffusion.tracking.run import Lineage, TrackedRun, unfinished_run
from diffusion.tracking.sender import MetricsSender
from diffusion.tracking.system import SystemMetrics
from diffusion.trust.redaction import first_line, fit_to_leave
from flows.code import UNKNOWN, git_commit, this_code
from flows.endings import ENDING, Ending, close_abandoned, close_tasks_of_ended_runs, note_ending
from flows.engines.engine import Job
from flows.engines.known import engine
from flows.engines.placement import Workers
from flows.launcher import Listener
from flows.owner import FLOW_FOLDER, signs_of_life, this_process
from flows.progress import Phase, attended, say
from flows.request import TrainingRequest
from flows.stopwatch import stopwatch


@dataclass(frozen=True)
class Run:
    """One training from its dataset to its model version."""

    request: TrainingRequest
    recipe: Recipe
    dataset: Manifest
    tracked: TrackedRun
    sender: MetricsSender
    lineage: Lineage
    settings: Settings

    @property
    def key(self) -> str:
        """What it is called in the store and on disk; for people it has another name."""
        return self.lineage.key

    @property
    def store(self) -> Store:
        """Where checkpoints and evaluations go. Anew each time: the keys to it may have been renewed."""
        return open_store(self.settings.store_uri)

    @property
    def folder(self) -> Path:
        """Working folder on this machine."""
        return self.settings.runs / self.key

    def job_fields(self) -> dict[str, Any]:
        """What every job of this run is told."""
        return job_fields(self.key, self.dataset, self.settings)


def job_fields(run: str, dataset: Manifest, settings: Settings) -> dict[str, Any]:
    """The fields that every job spec has."""
    return {
        "run": run,
        "store": settings.store_uri,
        "dataset": dataset.digest,
        "shard_copies": settings.shard_copies,
        "deterministic": settings.deterministic,
    }


def run_phase(title: str, key: str, job: Job, workers: Workers, recipe: Recipe, threads: int | None = None) -> None:
    """Run a job as one phase of the flow, with its progress shown and its time counted. Raises the job's error."""
    with Phase(title, key) as phase, stopwatch.part(job.part):

        def on_progress(progress: dict[str, Any]) -> None:
            note = progress["note"] or f"{progress['stage']}, {progress['done']:,} of {progress['total']:,}"
            phase.update(progress["done"], progress["total"], note)

        # At a terminal the bar tells enough; the whole output is in the folder either way.
        listener = Listener(on_progress) if attended() else Listener(on_progress, say)
        where = engine()
        where.run(job, workers, threads or where.threads(recipe), listener)


@contextmanager
def tracked_run(request: TrainingRequest, recipe: Recipe, dataset: Manifest) -> Iterator[Run]:
    """The run of this flow run, with its MLflow run open and fed; closed as finished, failed or killed.

    A retry of the flow run finds the same run again, and so does a new one of the same recipe, dataset and code, if the
    last of these did not finish. Runs whose process here has died are closed first.
    """
    environment = settings()
    flow_run_id, name = str(runtime.flow_run.id), str(runtime.flow_run.name)
    client, experiment_id = when_it_answers(partial(open_tracking, environment))
    when_it_answers(partial(close_abandoned, client, experiment_id, flow_run_id, environment.runs))
    try:
        close_tasks_of_ended_runs()
    except Exception as error:  # what a page shows of other runs is no reason to end this one
        say(f"Tasks of ended runs may still say that they run: {type(error).__name__}: {error}")
    commit, why = this_code()
    if why:
        say(
            f"The commit of this code is not known ({why}): models won't lead back to it, no new run goes on with this one, and no "
            "night is skipped. TRAIN_DIFFUSION_COMMIT names it."
        )
    # The flow run's name is made anew by a retry; its id is not.
    key, lock = f"{recipe.name}-seed{recipe.seed}-{flow_run_id}", None
    unfinished = when_it_answers(partial(unfinished_run, client, experiment_id, recipe, dataset, commit))
    if unfinished is not None:
        try:
            key, lock = unfinished, lock_folder(environment.runs / unfinished / FLOW_FOLDER, seconds=0)
            say(f"Going on with {unfinished}, which did not finish.")
        except RunBusy:  # another flow run was first
            say(f"{unfinished} is being continued by another flow run: starting anew.")
    lock = lock or lock_folder(environment.runs / key / FLOW_FOLDER)
    lineage = Lineage(
        key=key,
        name=name,
        commit=commit,
        flow_run_id=flow_run_id,
        flow_run_url=str(runtime.flow_run.ui_url or "") if runtime.deployment.id else "",
        owner=this_process(),
    )
    tracked = when_it_answers(
        partial(TrackedRun.open, client, experiment_id, lineage, recipe, dataset, environment.store_uri)
    )
    _take_name(tracked.name)
    if tracked.earlier_commits:
        say(
            f"It was begun by other code, {tracked.earlier_commits}, and goes on by {commit}: its version will name both."
        )
    folder = environment.runs / key
    (folder / ENDING).unlink(missing_ok=True)  # of an earlier attempt, which goes on
    with (
        lock,
        signs_of_life(folder),
        SystemMetrics(tracked, partial(engine().watched, folder)),
        MetricsSender(tracked, folder) as sender,
    ):
        run = Run(request, recipe, dataset, tracked, sender, lineage, environment)
        try:
            yield run
        except Exception as error:
            close(tracked, folder, Ending(status="FAILED", reason=f"{type(error).__name__}: {error}"))
            raise
        except BaseException as error:  # a cancellation, an interrupt
            close(tracked, folder, Ending(status="KILLED", reason=type(error).__name__))
            raise
    close(tracked, folder, Ending(status="FINISHED"))


def note_code(run: Run) -> None:
    """To be called before whatever a run starts: by now other code may lie here than it was begun by, and it is that which runs."""
    commit, before = git_commit(), run.tracked.commit
    # Git that fails for once says nothing.
    if commit != UNKNOWN and when_it_answers(partial(run.tracked.goes_on_by, commit)):
        say(f"The code here was {before}, and is {commit} now: the run goes on by it, and its version will name both.")


def _take_name(name: str) -> None:
    """Have the flow run called like the run that it goes on with."""
    if name == str(runtime.flow_run.name):
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(runtime.flow_run.id)), name=name)
    except Exception as error:  # what a page calls it is no reason to end it
        say(f"Prefect goes on calling this run {runtime.flow_run.name}, which is {name}: {first_line(error)}")


def close(tracked: TrackedRun, folder: Path, ending: Ending) -> None:
    """End the MLflow run. What MLflow can't be told now, the next start here tells it: the flow's own end doesn't depend on it."""
    end = partial(tracked.close, ending.status, ending.reason)
    try:
        note_ending(folder, ending)
        end() if ending.status == "KILLED" else when_it_answers(end)  # who cancelled a run does not wait for minutes
        (folder / ENDING).unlink(missing_ok=True)
    except Exception as error:
        reason = fit_to_leave(str(error))
        say(
            f"MLflow could not be told that its run {tracked.run_id} is {ending.status} ({reason}): the next start tells it."
        )
