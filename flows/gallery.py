"""The gallery of a run: its pictures and figures on one page."""

from __future__ import annotations

import numpy as np

from diffusion.evaluation.figures import number, table, with_error
from diffusion.evaluation.pictures import by_class, thumbnail
from diffusion.evaluation.scores import Scores
from diffusion.presentation.page import Picture, Section, page
from diffusion.presentation.plots import (
    as_png,
    bound_by_noise_level,
    class_distances,
    fid_over_training,
    gradient_norms,
    loss_by_noise_level,
)
from diffusion.tracking.promotion import Decision
from diffusion.training.journal import JOURNAL, records
from diffusion.training.state import CheckpointState, checkpoint_file
from flows.run import Run
from flows.tasks.evaluate import evaluation_picture, evaluations

GRIDS = 8
"""Grids over training that are shown, the last among them."""
PIXELS = 1024


def gallery(title: str, run: Run, state: CheckpointState, scores: Scores, decision: Decision) -> str:
    """The page of a finished run, as HTML."""
    history, spec = evaluations(run, state.step), run.dataset.images
    shown = [history[k] for k in sorted(set(np.linspace(0, len(history) - 1, GRIDS).round().astype(int).tolist()))]
    course = records(checkpoint_file(run.store, state, JOURNAL))
    figures = {
        "FID over training": as_png(fid_over_training(history)),
        "Loss by noise level": as_png(loss_by_noise_level(course)),
        "Gradient norms": as_png(gradient_norms(course)),
    }
    if scores.bound is not None:
        figures["Where the bits of the bound come from"] = as_png(bound_by_noise_level(scores.bound))
    if scores.parts("fid_of_class"):
        figures["FID by class"] = as_png(class_distances(scores))

    def picture(name: str, caption: str, step: int = state.step) -> Picture:
        return Picture(caption, thumbnail(evaluation_picture(run, step, name), PIXELS))

    grids = [
        picture(
            "grid", f"Step {one.step:,}, {one.images_seen:,} images seen: FID {one.require('fid').value:.1f}", one.step
        )
        for one in reversed(shown)
    ]
    figures_table = [(name, *map(number, values)) for name, *values in table(scores)]
    sections = [
        Section(
            "Samples and real images",
            ("The same classes in the same order, d" if by_class(spec, run.recipe.network.class_conditional) else "D")
            + "rawn by the model and taken from the test split.",
            (picture("grid", "Generated"), picture("real", "Real")),
        ),
        Section("Over training", "The same noise at every milestone, newest first.", tuple(grids), series=True),
        Section(
            "Out of the noise, and between two samples",
            "On the left what a sample is made from at evenly spaced steps of its walk, on the right samples whose starting noise "
            "lies between that of the first and the last column.",
            (picture("trajectory", "Denoising"), picture("interpolation", "Interpolation")),
        ),
        Section(
            "Closest training images",
            f"The samples that lie nearest to a training image, above it. Memorisation "
            f"{with_error(scores.require('memorisation'))}; new real images have 1.",
            (picture("closest", "Samples above their nearest training images"),),
        ),
        Section("Figures", "", tuple(Picture(caption, data) for caption, data in figures.items())),
        Section(
            "Promotion",
            f"Version {decision.version} of {decision.model} is {decision.alias}. {decision.reason}",
            rows=(
                ("gate", "passed", "figures"),
                *((gate.name, "yes" if gate.passed else "no", gate.figures) for gate in decision.gates),
            ),
        ),
        Section("Scores", "", rows=(("figure", "value", "standard error", "real images"), *figures_table)),
    ]
    recipe = run.recipe
    pixels = f"{recipe.data.image_size} x {recipe.data.image_size} pixels"
    digests = {
        "code": run.tracked.commit,
        "dataset": run.dataset.digest,
        "recipe": recipe.digest,
        "checkpoint": state.digest,
    }
    lead = (
        f"Run {run.key}: {recipe.name} on {run.dataset.source}, {pixels}, seed {recipe.seed}, {state.images_seen:,} images seen; "
        + ", ".join(f"{name} {digest[:12]}" for name, digest in digests.items())
    )
    return page(title, lead, sections)
