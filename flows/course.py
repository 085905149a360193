"""How far a whole flow run is and how long it will still take: a job knows of its own part alone.

Parts are weighed in passes of the network: a training image is three (forward, and backward twice that), a sample one a step, or two
where it is guided. What has been measured counts for all parts of its kind; an evaluation before the first goes by the training's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.training.state import weights_to_try

TRAINING_PASSES = 3.0
SURE_AFTER = 60.0
"""Seconds of training after which its speed is believed."""
JUDGED_WITHIN = 1800.0
"""Seconds after its first step in which a run is refused for the time that it takes: later it has cost too much."""


@dataclass(frozen=True)
class Leg:
    """One job of the run."""

    key: str
    kind: Literal["training", "evaluation"]
    passes: float


def legs_of(recipe: Recipe) -> tuple[Leg, ...]:
    """The training to each milestone, and the evaluation there."""
    evaluation, legs, before = recipe.evaluation, [], recipe.first_step
    a_sample = evaluation.sampler_steps * (2 if recipe.network.class_conditional and evaluation.guidance != 1 else 1)
    likelihood = evaluation.likelihood_images * evaluation.likelihood_timesteps
    for step in recipe.milestones:
        images = (step - before) * recipe.data.batch_size
        tried = len(weights_to_try(recipe, step))
        samples = evaluation.samples + (evaluation.choice_samples * tried if tried > 1 else 0)
        legs.append(Leg(f"train-{step}", "training", TRAINING_PASSES * images))
        legs.append(Leg(f"evaluate-{step}", "evaluation", float(samples * a_sample + likelihood)))
        before = step
    return tuple(legs)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The keys of all that shows progress, in order."""
    extractors = recipe.evaluation.extractors
    own = ("extractor",) if "own" in extractors else ()
    references = (f"reference-{extractor}" for extractor in extractors)
    return ("download", "ingest", *own, *references, *(leg.key for leg in legs_of(recipe)))


class Course:
    """Of one flow run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began, self._limit = clock(), float("inf")
        self._recipe: Recipe | None = None
        self._stages: tuple[str, ...] = ()
        self._legs: tuple[Leg, ...] = ()
        self._seconds_a_pass: dict[str, float] = {}
        # The stage, its begin, and its share when it first told one.
        self._now: tuple[str, float, float | None] = ("", 0.0, None)
        self._trains_since: float | None = None

    def begin(self, recipe: Recipe, limit_seconds: float | None = None) -> None:
        """Say what is to be done. Called again with the recipe that comes of the dataset, it goes on."""
        self._recipe, self._stages, self._legs = recipe, stages_of(recipe), legs_of(recipe)
        if limit_seconds is not None:
            self._limit = limit_seconds

    def number(self, stage: str) -> str:
        """`[4/8] ` for the fourth of eight stages; nothing for one that is not among them."""
        known = stage in self._stages
        return f"[{self._stages.index(stage) + 1}/{len(self._stages)}] " if known else ""

    def enter(self, stage: str) -> None:
        """A stage begins."""
        self._now = (stage, self._clock(), None)

    def leave(self) -> None:
        """It has ended: an evaluation is measured by all of it."""
        leg = self._leg()
        if leg is not None and leg.kind == "evaluation":
            self._seconds_a_pass["evaluation"] = (self._clock() - self._now[1]) / leg.passes

    def advance(self, share: float) -> None:
        """So much of the stage is done. Raises RecipeError if the run would take longer than its limit, or has."""
        if self._clock() - self._began > self._limit:
            raise RecipeError(
                f"The {duration(self._limit)} of time_limit are over. What is done is kept: a retry, or a run of the same seed and "
                "recipe, goes on from the newest checkpoint for as long again."
            )
        stage, began, first = self._now
        leg = self._leg()
        if leg is None or leg.kind != "training":
            return
        if first is None:  # what it goes on from was done before
            self._now = (stage, self._clock(), share)
            self._trains_since = self._trains_since or self._clock()
            return
        assert self._trains_since is not None
        took = self._clock() - began
        if share > first and took > 0:
            self._seconds_a_pass["training"] = took / (leg.passes * (share - first))
            if took >= SURE_AFTER and self._clock() - self._trains_since <= JUDGED_WITHIN:
                self._check(share)

    def left(self, share: float) -> float | None:
        """Seconds until the end of the run, about; None before anything has been measured.

        Args:
            share: how much of the present stage is done, from 0 to 1.
        """
        leg = self._leg()
        if leg is None or not self._seconds_a_pass:
            return None
        ahead = self._legs[self._legs.index(leg) + 1 :]
        own = self._seconds(leg)
        rest = own * (1 - share) if leg.kind == "training" else max(0.0, own - (self._clock() - self._now[1]))
        return rest + sum(map(self._seconds, ahead))

    def _leg(self) -> Leg | None:
        return next((leg for leg in self._legs if leg.key == self._now[0]), None)

    def _seconds(self, leg: Leg) -> float:
        known = self._seconds_a_pass
        return leg.passes * known.get(leg.kind, next(iter(known.values())))

    def _check(self, share: float) -> None:
        left = self.left(share)
        assert left is not None
        assert self._recipe is not None
        whole = self._clock() - self._began + left
        if whole > self._limit:
            data = self._recipe.data
            asked = data.images - self._recipe.first_step * data.batch_size  # without those that it goes on from
            fits = float(f"{asked * self._limit / whole:.2g}")
            raise RecipeError(
                f"At the speed of its first steps the run would take {duration(whole)}, and time_limit is {duration(self._limit)}. On "
                f"this machine about data.images={fits:.0f} fit; or choose a smaller preset, or give more time."
            )


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"


course = Course()
"""Of this process: a flow run has a process to itself."""
