"""What came out, for people: a Prefect artifact, and the table at the end of a run by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel

from diffusion.evaluation.figures import full_name, in_order, number, of_how_many, table, with_error
from diffusion.evaluation.scores import Scores
from diffusion.presentation.markdown import markdown_table, plain
from diffusion.store import layout
from diffusion.tracking.gates import gates_table
from diffusion.tracking.pages import run_page
from diffusion.tracking.promotion import Decision
from diffusion.tracking.scores_tag import scores_of
from diffusion.training.journal import JOURNAL, records
from diffusion.training.state import CheckpointState, checkpoint_file
from flows.gallery import gallery
from flows.progress import say, show
from flows.run import Run
from flows.tasks.evaluate import grid_for_prefect
from flows.tasks.retrying import RETRIED

GALLERY = "gallery.html"
GRID = "sample grid"


class Report(BaseModel):
    """The end of a run in a table."""

    rows: dict[str, str]
    """Label and text, in the order to show them."""


@task(
    name="report",
    task_run_name="report",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def report(run: Run, state: CheckpointState, scores: Scores, decision: Decision) -> Report:
    """Write the gallery to MLflow and the report to Prefect, and return the report's table."""
    try:
        run.tracked.log_text(gallery(str(runtime.flow_run.name), run, state, scores, decision), GALLERY)
        run.tracked.conclude(
            f"Version {decision.version} became **{decision.alias}** on {datetime.now(UTC):%d %B %Y}. {plain(decision.reason)}",
            GALLERY,
        )
    except Exception as error:  # a page is no reason to call a run failed whose model may be live
        say(f"There is no gallery of this run: {type(error).__name__}: {error}")
    metrics = [record for record in _journal(run, state) if record["kind"] == "metrics"]
    rows = {
        "dataset": f"{run.dataset.source} {run.dataset.digest[:16]}, {run.dataset.splits['train']:,} training images",
        "recipe": f"{run.recipe.name} {run.recipe.digest[:16]}, seed {run.recipe.seed}",
        "steps": f"{state.step:,} of {run.recipe.data.batch_size} images",
        "loss": f"{sum(r['loss'] for r in metrics[-50:]) / len(metrics[-50:]):.4f} (mean of the last records)",
    }
    for one, row in in_order(scores):
        if one.place == "headline":
            real = "" if row.real is None else f"; real images: {row.real:.{one.digits}f}"
            rows[full_name(row)] = f"{with_error(row)} ({of_how_many(one, scores)}{real})"
    if scores.bound is None:
        rows["bits_per_dim"] = f"none: images of {run.dataset.images.dtype} have no likelihood in bits"
    rows["model version"] = f"{decision.model} {decision.version}, {decision.alias}. {decision.reason}"
    rows[GRID] = f"{run.store.uri}/{layout.picture(run.key, state.step, 'grid')}"

    try:
        page = _markdown(run, state, scores, rows, decision)
    except Exception as error:  # nor is this one
        say(f"There is no report of this run: {type(error).__name__}: {error}")
        page = None
    show(f"Version {decision.version} became {decision.alias}.", page)
    return Report(rows=rows)


def _journal(run: Run, state: CheckpointState) -> list[dict[str, Any]]:
    return records(checkpoint_file(run.store, state, JOURNAL))


def _mlflow_page(run: Run, artifact: str = "") -> str:
    """Address of the run's page, or of an artifact of it; nothing where there is no server."""
    uri = run.settings.tracking_pages or run.settings.tracking_uri
    return (
        f"{uri.rstrip('/')}/{run_page(run.tracked.experiment_id, run.tracked.run_id, artifact)}"
        if uri.startswith("http")
        else ""
    )


def _comparison(run: Run, scores: Scores, decision: Decision) -> str:
    """The figures beside those of the version that was champion, as a Markdown table."""
    champion: dict[str, str] = {}
    query = f"name = '{decision.model}' and version_number = {decision.against}"
    for version in run.tracked.client.search_model_versions(query) if decision.against else ():  # it may be gone since
        before = scores_of(version, run.store)
        champion = {name: _figure(value, error) for name, value, error, _ in table(before)} if before else {}
    heading = f"version {decision.against}, champion then" if decision.against else "no champion yet"
    rows = (
        (name, _figure(value, error), champion.get(name, ""), _figure(real, None))
        for name, value, error, real in table(scores)
    )
    return markdown_table(("figure", "this run", heading, f"real images (n = {scores.real_samples:,})"), rows)


def _figure(value: float | None, error: float | None) -> str:
    return number(value) + ("" if error is None else f" ± {error:.2g}")


def _markdown(run: Run, state: CheckpointState, scores: Scores, rows: dict[str, str], decision: Decision) -> str:
    parts = [f"# {runtime.flow_run.name}", f"**{decision.alias}**: {plain(decision.reason)}"]
    if link := _mlflow_page(run):
        parts.append(f"[Run in MLflow]({link}) · [Gallery]({_mlflow_page(run, GALLERY)})")
    shown = {**rows, "model version": f"{decision.model} {decision.version}"}  # what became of it stands above
    parts.append(markdown_table(("what", "value"), ((key, text) for key, text in shown.items() if key != GRID)))
    parts.append(_comparison(run, scores, decision))
    if decision.gates:
        parts.append(gates_table(decision.gates))
    parts.append(grid_for_prefect(run, state.step))
    return "\n\n".join(parts) + "\n"
