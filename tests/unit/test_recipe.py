"""Recipes: presets, overrides with help for the misspelt, digests, milestones, and what can't be trained."""

from importlib.resources import files
from pathlib import Path

import pytest

from benchmarks.quality import BUDGETS, arms
from diffusion.errors import RecipeError
from diffusion.recipe import Network, Recipe, Start, flatten
from diffusion.recipe_files import load_recipe, preset_names, recipe_keys
from diffusion.training.trainer import lanes_of_process, learning_rate
from flows.engines.local import usable_processes
from flows.engines.placement import Capacity, Host, Placement
from flows.request import TrainingRequest
from tests.conftest import tiny_recipe


def test_presets_load_and_their_digests_differ() -> None:
    assert preset_names() == ["demo", "eurosat", "overnight", "seed"]
    assert len({load_recipe(name).digest for name in preset_names()}) == 4


def test_an_unknown_preset_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'eurosat'"):
        load_recipe("eurosta")


def test_an_unknown_override_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'network\.width'"):
        load_recipe("demo", {"network.widht": 32})
    with pytest.raises(RecipeError, match="valid names"):
        load_recipe("demo", {"zzzzzzzz": 1})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.batch_size": 60, "data.lanes": 8}, "not a multiple"),
        ({"data.lanes": 3, "data.batch_size": 60}, "power of two"),
        ({"data.image_size": 50}, "image_size"),
        ({"network.multipliers": [1, 2, 2, 2, 2, 2, 2]}, "halved"),
        ({"optimizer.learning_rate": -1}, "learning_rate"),
        ({"optimizer.learning_rate": "fast"}, "learning_rate"),
        ({"network.kind": "seed", "network.class_conditional": False}, "lanes to 1"),
        ({"process.zero_terminal_snr": True}, "uniform_time"),
        ({"process.zero_terminal_snr": True, "objective.loss": "hybrid"}, "loss simple"),
        ({"ema.half_lives": [500.2, 500.4]}, "twice"),
        ({"process.log_snr_min": 9}, "below process.log_snr_max"),
        ({"ema.half_lives": []}, "half_lives"),
        ({"network.label_dropout": 0}, "never learns that"),
        ({"objective.weighting": "p2"}, "p2 takes 0.5 or 1"),
        ({"objective.weighting": "min_snr", "objective.loss": "vlb"}, "for objective.loss simple"),
        ({"network.class_conditional": False}, "guidance needs"),
        ({"evaluation.extractors": []}, "at least one"),
        ({"evaluation.extractors": ["eurosat", "eurosat"]}, "none twice"),
        ({"evaluation.samples": 5}, "10 samples or more"),
        ({"process.zero_terminal_snr": True, "evaluation.spacing": "uniform_time"}, "log_snr_min"),
    ],
)
def test_a_recipe_that_can_t_be_trained_says_why(overrides: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("demo", overrides)


MINE = "data: {images: 4096, batch_size: 32}\nnetwork: {width: 32}\nevaluation: {every_images: 2048}\n"


def test_a_recipe_may_be_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    recipe = load_recipe(str(path), {"network.width": 40}, seed=3)
    assert (recipe.name, recipe.data.images, recipe.network.width, recipe.seed) == ("mine", 4096, 40, 3)
    without = MINE.replace("network: {width: 32}\n", "")
    for text in (without, without + "network:\n  # width: 32\n"):
        path.write_text(text)
        assert load_recipe(str(path), {"network.width": 40}).network == Network(width=40)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.yaml", None, "There is no recipe at .*none.yaml"),
        ("demo.yaml", MINE, "the name of a preset"),
        ("m\u00fcll.yaml", MINE, "Letters, digits"),
        ("mine.yaml", MINE + "evaluations: {samples: 3}\n", "did you mean 'evaluation.samples'"),
        ("mine.yaml", MINE.replace("width", "widht"), r"did you mean 'network\.width'"),
        ("mine.yaml", MINE + "start: {run: a, step: 1, digest: b}\n", "unknown key 'start.run'"),
        ("mine.yaml", "a: b: c", "is no YAML: .*line 1"),
        ("mine.yaml", "\0", "is no YAML"),
        ("mine.yaml", "- 1\n- 2\n", "has no keys"),
        ("mine.yaml", "", "has no keys"),
        ("mine.yaml", MINE.replace("4096", "many"), r"data\.images: .*valid integer"),
        ("mine.yaml", MINE.replace("{images: 4096, batch_size: 32}", "5"), "data: "),
        ("mine.yaml", "x" * (1 << 21), "has more than"),
    ],
)
def test_a_recipe_s_file_that_can_t_be_used_is_answered_with_a_sentence(
    tmp_path: Path, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=said) as error:
        load_recipe(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_what_came_later_leaves_the_digests_of_before() -> None:
    """The demo's recipe as its first users have it, from before there was a guidance interval."""
    before = load_recipe("demo", {"evaluation.sampler_steps": 20})
    assert before.digest == "b9a50ff594498d04b5b06b86745d7dab7abddb550094f5f42b5f2aac7724c85c"
    assert "guidance_interval" not in before.model_dump_json()
    after = load_recipe("demo", {"evaluation.guidance_interval": [0.3, 3]})
    assert type(after).model_validate_json(after.model_dump_json()) == after
    assert after.digest != before.digest


def test_every_value_says_what_it_means() -> None:
    """For forms and references: the JSON schema has each field's docstring."""
    schema = Recipe.model_json_schema()
    parts = {name: part["properties"] for name, part in schema["$defs"].items()}
    parts["Recipe"] = {name: field for name, field in schema["properties"].items() if "$ref" not in field}
    silent = [
        f"{part}.{name}"
        for part, fields in parts.items()
        for name, field in fields.items()
        if "description" not in field
    ]
    assert [name for name in silent if name != "Recipe.start"] == []


def test_an_override_typed_as_text_means_what_it_means_in_yaml() -> None:
    typed = load_recipe("demo", {"network.multipliers": "[1, 2]", "ema.ramp": "null", "data.horizontal_flip": "false"})
    assert typed == load_recipe(
        "demo", {"network.multipliers": [1, 2], "ema.ramp": None, "data.horizontal_flip": False}
    )


def test_every_key_can_be_overridden_and_is_a_parameter() -> None:
    recipe = load_recipe(
        "demo",
        {
            "evaluation.guidance_interval": [0.3, 3],
            "objective.alignment": 0.5,
            "evaluation.extractors": ["own", "eurosat"],
        },
    )
    flat = flatten(recipe)
    assert set(recipe_keys()) | {"name", "start"} == set(flat)
    assert load_recipe("demo", {key: value for key, value in flat.items() if key not in ("name", "start")}) == recipe


def test_the_seed_changes_the_digest() -> None:
    assert load_recipe("demo", seed=1).digest != load_recipe("demo", seed=2).digest


def test_milestones_end_at_the_last_step_and_leave_no_crumb_before_it() -> None:
    assert tiny_recipe().milestones == (8, 16)
    assert tiny_recipe(data__images=272).milestones == (8, 17)
    assert tiny_recipe(data__images=255, evaluation__every_images=10_000).milestones == (16,)


def test_the_learning_rate_rises_and_falls_by_images() -> None:
    recipe = tiny_recipe(optimizer__learning_rate=1.0, optimizer__decay="cosine")
    assert learning_rate(recipe, 16) < 1 / 2 + 1e-9
    assert learning_rate(recipe, 32) == pytest.approx(0.5 * (1 + 0.9238795), rel=1e-6)
    assert learning_rate(recipe, 256) == pytest.approx(0, abs=1e-12)
    again = recipe.continued(Start(run="r", step=16, digest="d" * 64), recipe)
    assert again.data.images == 512
    assert again.milestones == (24, 32)
    assert learning_rate(again, 256) == pytest.approx(1)
    assert learning_rate(again, 384) == pytest.approx(0.5)
    assert learning_rate(again, 512) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        {"network__width": 8},
        {"data__batch_size": 32},
        {"process__prediction": "epsilon"},
        {"optimizer__kind": "adamw"},
        {"ema__half_lives": [1000]},
        {"objective__alignment": 0.5, "evaluation__extractors": ["own", "eurosat"]},
    ],
)
def test_a_state_of_another_form_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="can't go on from step 16 of r"):
        tiny_recipe(**other).continued(Start(run="r", step=16, digest="d" * 64), tiny_recipe())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_lanes(processes: int) -> None:
    recipe = tiny_recipe(data__lanes=4)
    shares = [lanes_of_process(recipe, rank, processes) for rank in range(processes)]
    assert [lane for share in shares for lane in share] == [0, 1, 2, 3]


def test_a_seed_that_a_file_or_an_override_names_is_not_passed_over(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"seed: 5\n{(files('diffusion') / 'presets/demo.yaml').read_text()}")
    for preset, overrides in ((str(mine), {}), ("demo", {"seed": 5})):
        assert load_recipe(preset, overrides).seed == 5
        with pytest.raises(RecipeError, match="sets seed, a parameter of the run: -p seed=5"):
            TrainingRequest(preset=preset, overrides=overrides, seed=7).recipe()


def test_lanes_that_processes_can_t_share_are_refused_with_what_would_fit() -> None:
    recipe = tiny_recipe(data__lanes=4)
    with pytest.raises(RecipeError, match="1, 2, 4"):
        lanes_of_process(recipe, 0, 3)
    with pytest.raises(RecipeError, match="1, 2, 4"):
        usable_processes(recipe, 3)
    assert usable_processes(recipe, 4) == 4
    assert usable_processes(recipe, None) in (1, 2, 4)
    assert usable_processes(recipe, "2-3") == 2, "what shares the lanes, and there is room for"
    with pytest.raises(RecipeError, match=r"No number of processes from 5 to 7 shares data\.lanes = 4 evenly"):
        usable_processes(recipe, "5-7")
    for slip in ("4-2", "0", "two", "2-", "1e9-2"):
        with pytest.raises(RecipeError, match=r"processes is .*range"):
            usable_processes(recipe, slip)


def test_a_range_of_processes_is_filled_as_far_as_there_is_room() -> None:
    placement = Placement(module="m", counts=(1, 2, 4), threads=2)
    room = {cpus: placement.fitting(cluster((cpus, 0))) for cpus in (1, 2, 3, 4, 7, 8, 100)}
    assert room == {1: (), 2: (1,), 3: (1,), 4: (2, 1), 7: (2, 1), 8: (4, 2, 1), 100: (4, 2, 1)}
    assert placement.fitting(cluster((3, 0), (3, 0))) == (2, 1), "a process is on one host"


def test_a_job_on_gpus_never_goes_on_without_them() -> None:
    placement = Placement(module="m", counts=(1, 2, 4), gpu=True)
    assert placement.fitting(cluster((64, 1), (64, 2))) == (2, 1)
    assert placement.fitting(cluster((64, 0))) == ()
    assert placement.fitting(cluster((2, 8))) == (2, 1), "a CPU each"
    assert "1 processes with 1 CPU and a GPU each" in placement.too_small(cluster((64, 0)))


def cluster(*hosts: tuple[int, int]) -> Capacity:
    return Capacity(hosts=tuple(Host(cpus=cpus, gpus=gpus) for cpus, gpus in hosts))


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_the_quality_benchmark_compares_are_recipes(budget: str) -> None:
    assert [arm.recipe.data.images for arm in arms(BUDGETS[budget], seed=0)][:2] == [BUDGETS[budget].images] * 2
