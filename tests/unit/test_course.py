"""How long a whole run will take, told from what has been measured of it."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from diffusion.errors import RecipeError
from diffusion.jobs.reports import ProgressFile
from diffusion.recipe import Recipe, Start
from diffusion.recipe_files import load_recipe
from diffusion.training.recorder import Recorder
from diffusion.training.trainer import StepReport
from flows.course import Course, duration, legs_of, stages_of
from tests.conftest import tiny_recipe


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_parts_of_a_run_are_weighed_by_what_the_network_does() -> None:
    demo = load_recipe("demo", {"evaluation.guidance": 2.0, "evaluation.sampler_steps": 10})
    train, evaluate, *_ = legs_of(demo)
    assert (train.key, train.passes) == ("train-768", 3 * 12288)
    assert (evaluate.key, evaluate.passes) == ("evaluate-768", 750 * 10 * 2 + 200 * 8)
    unguided = load_recipe("demo", {"evaluation.guidance": 1.0, "evaluation.sampler_steps": 10})
    assert legs_of(unguided)[1].passes == 750 * 10 + 200 * 8


def test_stages_are_numbered_in_their_order() -> None:
    course = Course()
    assert course.number("ingest") == ""
    course.begin(tiny_recipe())
    assert course.number("download") == "[1/7] "
    assert course.number("evaluate-16") == "[7/7] "
    assert course.number("score-champion") == ""
    own = load_recipe("demo", {"evaluation.extractors": ["own"]})
    assert stages_of(own)[:4] == ("download", "ingest", "extractor", "reference-own")


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_what_is_left_is_right_where_the_speeds_are_what_was_measured(training: float, evaluation: float) -> None:
    """Seconds a pass of both kinds, on a machine that keeps them."""
    clock, recipe = Clock(), tiny_recipe()
    course = Course(clock)
    course.begin(recipe)
    parts = legs_of(recipe)
    seconds = [part.passes * (training if part.kind == "training" else evaluation) for part in parts]
    for part, took in list(zip(parts, seconds, strict=True))[:2]:
        course.enter(part.key)
        course.advance(0.0)
        clock.now += took
        course.advance(1.0)
        course.leave()
    course.enter(parts[2].key)
    course.advance(0.0)
    clock.now += seconds[2] / 4
    course.advance(0.25)
    assert course.left(0.25) == pytest.approx(0.75 * seconds[2] + seconds[3])


def share_told(folder: Path, recipe: Recipe, until: int, step: int) -> float:
    """What a training job that has come to `step` tells of its part."""
    with mock.patch("diffusion.training.recorder.peak_flops", return_value=1e9):  # takes seconds to measure
        recorder = Recorder(recipe, Accelerator(cpu=True), folder, until, 1e6)
    recorder.every = 1
    recorder.record(step, StepReport([torch.ones(16)], [torch.zeros(16)], torch.ones(()), 0.1), 0.0)
    told = json.loads((folder / ProgressFile.NAME).read_text())
    return float(told["done"] / told["total"])


def test_each_stretch_of_a_training_tells_of_itself_also_one_that_goes_on_from_a_champion(tmp_path: Path) -> None:
    """At one speed the estimate is right at all times, and no run is refused that ends in time."""
    recipe = load_recipe("eurosat", {"data.images": 1_536_000, "evaluation.every_images": 384_000})
    start = Start(run="before", step=90_000, digest="0" * 64)
    for run in (recipe, recipe.continued(start, recipe)):
        clock, second_a_pass = Clock(), 1e-3
        course = Course(clock)
        seconds = [part.passes * second_a_pass for part in legs_of(run)]
        course.begin(run, limit_seconds=sum(seconds) + 60)
        ends = dict(zip(run.milestones, range(0, 100, 2), strict=False))
        for until, index in ends.items():
            course.enter(f"train-{until}")
            began, first = clock.now, run.stretch_start(until)
            for step in range(first + 1, until, (until - first) // 5):
                clock.now = began + seconds[index] * (step - first) / (until - first)
                share = share_told(tmp_path, run, until, step)
                course.advance(share)
                left = course.left(share)
                if left is not None:
                    assert left == pytest.approx(sum(seconds) - clock.now, rel=1e-6)
            clock.now = began + seconds[index]
            course.enter(f"evaluate-{until}")
            clock.now += seconds[index + 1]
            course.leave()


def test_nothing_is_said_before_anything_is_known() -> None:
    course = Course(Clock())
    course.begin(tiny_recipe())
    assert course.left(0.0) is None
    course.enter("train-8")
    course.advance(0.0)
    assert course.left(0.0) is None


def test_what_can_t_end_in_time_is_refused_with_what_fits() -> None:
    clock = Clock()
    course = Course(clock)
    recipe = load_recipe("eurosat")
    course.begin(recipe, limit_seconds=20 * 3600)
    first = recipe.milestones[0]
    course.enter(f"train-{first}")
    course.advance(0.0)
    clock.now += 30
    course.advance(30 / (86_400 * 7))  # too soon to be believed
    clock.now += 60
    with pytest.raises(
        RecipeError, match=r"would take .* days, and time_limit is 20 hours. .*data.images=[0-9]+ fit"
    ) as refused:
        course.advance(90 / (86_400 * 7))
    fits = int(str(refused.value).split("data.images=")[1].split()[0])
    assert 0 < fits < recipe.data.images * 20 / 24 / 6

    course.begin(recipe, limit_seconds=400 * 24 * 3600)
    clock.now += 60
    course.advance(150 / (86_400 * 7))


def test_what_fits_is_told_in_images_that_a_run_is_asked_for_whatever_it_goes_on_from() -> None:
    recipe = load_recipe("eurosat")
    clock = Clock()
    for run in (recipe, recipe.continued(Start(run="before", step=10 * recipe.total_steps, digest="0" * 64), recipe)):
        course = Course(clock)
        course.begin(run, limit_seconds=20 * 3600)
        course.enter(f"train-{run.milestones[0]}")
        course.advance(0.0)
        clock.now += 90
        with pytest.raises(RecipeError, match=r"data\.images=[0-9]+ fit") as refused:
            course.advance(90 / (86_400 * 7))
        assert int(str(refused.value).split("data.images=")[1].split()[0]) < recipe.data.images


def test_what_has_cost_hours_is_not_refused_in_a_later_stage() -> None:
    clock, recipe = Clock(), load_recipe("eurosat")
    course = Course(clock)
    course.begin(recipe, limit_seconds=20 * 3600)
    clock.now += 1
    first, second = recipe.milestones[:2]
    course.enter(f"train-{first}")
    course.advance(0.0)
    clock.now += 3600
    course.advance(1.0)
    course.enter(f"train-{second}")
    course.advance(0.0)
    clock.now += 300
    course.advance(0.001)  # at this speed: weeks


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_is_ended_when_its_time_is_over_whatever_it_does(stage: int) -> None:
    clock, recipe = Clock(), tiny_recipe()
    course = Course(clock)
    course.begin(recipe, limit_seconds=20 * 3600)
    course.enter(legs_of(recipe)[stage].key)
    clock.now = 20 * 3600
    course.advance(0.0)
    clock.now += 1
    with pytest.raises(RecipeError, match=r"The 20 hours of time_limit are over\. What is done is kept"):
        course.advance(0.01)


def test_a_run_that_goes_on_is_measured_by_what_it_does_now() -> None:
    clock = Clock()
    course = Course(clock)
    course.begin(tiny_recipe())
    course.enter("train-8")
    course.advance(0.5)  # done before
    clock.now += 10
    course.advance(0.75)
    left = course.left(0.75)
    assert left is not None
    assert left == pytest.approx(10 + 40 + 2 * legs_of(tiny_recipe())[1].passes * 40 / legs_of(tiny_recipe())[0].passes)


@pytest.mark.parametrize(
    ("seconds", "said"), [(12, "12 s"), (200, "3 min"), (7200, "2 hours"), (86_400 * 12, "12 days")]
)
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
