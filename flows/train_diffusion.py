"""The flow `train-diffusion`: from images to a scored, registered model. This file is its table of contents."""

from __future__ import annotations

import atexit
import gc
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from prefect import flow, runtime
from prefect.states import State
from pydantic import Field

from diffusion.recipe_files import fit_to_dataset, preset_names, recipe_name
from diffusion.settings import settings
from diffusion.tracking.gates import DEFAULT_MARGINS, Margins
from diffusion.trust.private import use_private_home
from diffusion.trust.redaction import redact_logs
from flows.checks import check_before_compute
from flows.course import course
from flows.deployed import be_the_only_run, cancel_tasks, end_with_worker, say_why
from flows.engines.placement import RANGE
from flows.nights import Nights, check_nights, is_night, seed_of
from flows.plugins.credentials import use_block
from flows.progress import attended
from flows.request import StartFrom, TrainingRequest, usual_preset
from flows.run import tracked_run
from flows.slot import keep_slots
from flows.tasks.evaluate import evaluate
from flows.tasks.extractor import train_extractor
from flows.tasks.ingest import find_source, ingest_archive
from flows.tasks.plan import plan, unchanged
from flows.tasks.promote import promote
from flows.tasks.reference import measure_reference
from flows.tasks.register import register
from flows.tasks.report import Report, report
from flows.tasks.train import train

keep_slots()
atexit.register(gc.freeze)  # as in a rank: a second and a half here

NAME = re.compile(r"[0-9]{4}-[0-9]{6}-")
"""How the name of a run begins: month and day, and the time, UTC."""
NIGHT_HOURS = 20.0

PRESETS = rf"^({'|'.join(preset_names())})$|\.ya?ml$"
"""What the server takes for a preset when a run is asked for: it says so, and not the run when it has begun."""


def _name() -> str:
    """What differs first: pages cut names. A run keeps its name through every retry."""
    own = str(runtime.flow_run.name)
    if NAME.match(own):
        return own
    parameters = runtime.flow_run.parameters
    seed = "" if is_night() and parameters["seed"] is None else f"-seed{parameters['seed'] or 0}"
    preset = parameters["preset"]
    recipe = f"-{recipe_name(preset)}" if preset else ""
    night = "-nightly" if is_night() else ""
    start = "-from-champion" if parameters["start_from"] == "champion" else ""
    return f"{datetime.now(UTC):%m%d-%H%M%S}{recipe}{seed}{start}{night}"


@flow(name="train-diffusion", flow_run_name=_name, on_crashed=[say_why], on_cancellation=[cancel_tasks])
def train_diffusion(
    preset: Annotated[str, Field(json_schema_extra={"pattern": PRESETS})] | None = None,
    overrides: dict[str, Any] = {},  # noqa: B006  never changed; a form has no field for one that may be absent
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None,
    source: str = "eurosat",
    source_options: dict[str, Any] = {},  # noqa: B006
    processes: Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=f"^{RANGE}$")] | None = None,
    start_from: StartFrom = "scratch",
    nights: Nights = "new seed",
    skip_unchanged: bool | None = None,
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None,
    fid_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_MARGINS.fid,
    bits_margin: Annotated[float, Field(ge=0, allow_inf_nan=False)] = DEFAULT_MARGINS.bits_per_dim,
    fid_bar: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DEFAULT_MARGINS.first,
) -> Report | State[None]:
    """Train a diffusion model, score it as it goes, and register it; it goes live only if it is better.

    Args:
        preset: The recipe to start from. "demo": 32 x 32, 24,576 images, five to ten minutes on two CPU cores. "overnight": 64 x 64,
            121,500 images, two to three hours there. "eurosat": 64 x 64, 6 million images, for GPUs, weeks on a CPU. "seed": what this
            project grew from, 64 x 64, hours on a CPU. Or the path of a file like theirs on the worker's machine: path/to/mine.yaml.
            Empty: eurosat where there is a GPU, else demo.
        overrides: Values of the recipe to replace, by dotted name: {"network.width": 96, "data.images": 1000000,
            "evaluation.every_images": 250000}. The deployment's description leads to a page of all of them.
        seed: Key of all randomness; empty: a scheduled night's is its date, as 20261124 (see nights), and 0 by hand.
        source: "eurosat" (EUROSAT_ARCHIVE, or the public archive), the path of a folder, zip, tar or Parquet table with images,
            "webdataset:" and tars, "eurosat-ms", or "generated".
        source_options: How these images are meant: {"size": 64, "fit": "crop", "bands": [...], "name": "mine"}.
        processes: Processes of each job: 4; on a cluster also a range, 2-8, of which it takes what there is room for. Empty: one a
            GPU, or what the CPUs allow.
        start_from: "scratch", or "champion": go on with the live model and its optimiser's state, for data.images more.
        nights: What scheduled nights are for. "new seed": each trains anew, with its date for a seed. "new data": with one seed, and
            only if images, recipe or code have changed since the last.
        skip_unchanged: End at once if a finished run has the same dataset, recipe, code and seed; empty: on scheduled nights.
        time_limit: Hours that the run may take; empty: 20 on scheduled nights. One that would take longer is refused after a minute of
            training, with what it would take and what fits; one that does take longer ends with a checkpoint.
        fid_margin: How far below the live model's the FID must be, beyond all doubt (95 %), for the new one to go live.
        bits_margin: How far above the live model's its bits/dim may be, beyond doubt, all the same.
        fid_bar: The first version of a model must have less than this share of the FID of one picture drawn over and over.
    """
    request = TrainingRequest(
        preset=preset or usual_preset(),
        overrides=overrides,
        seed=seed_of(seed, nights),
        source=source,
        source_options=source_options,
        processes=processes,
        start_from=start_from,
        skip_unchanged=is_night() if skip_unchanged is None else skip_unchanged,
        margins=Margins(fid_margin, bits_margin, fid_bar),
    )
    use_private_home(settings().home)
    redact_logs()
    if not attended():
        end_with_worker()
        be_the_only_run(settings().home, str(runtime.flow_run.name), str(runtime.flow_run.id))
    use_block(settings().s3_block)
    check_nights(nights, start_from)
    recipe, workers = check_before_compute(request, patient=is_night())
    limit = time_limit or (NIGHT_HOURS if is_night() else None)
    course.begin(recipe, limit and limit * 3600)
    archive = find_source(request.source, request.options())
    dataset = ingest_archive(archive, settings().store_uri)
    recipe = fit_to_dataset(recipe, request.overrides, dataset.images)
    train_extractor(dataset, recipe, workers)
    measure_reference(dataset, recipe, workers)
    recipe, same = plan(request, recipe, dataset)
    if same is not None:
        return unchanged(same)
    course.begin(recipe)
    with tracked_run(request, recipe, dataset) as run:
        for milestone in recipe.milestones:
            state = train(run, milestone, workers)
            scores = evaluate(run, state, workers)
        model, version = register(run, state, scores, workers)
        decision = promote(run, model, version, workers)
        return report(run, state, scores, decision)


if __name__ == "__main__":
    train_diffusion()
