"""Recipes from presets and from files: YAML that `Recipe` checks, with single values replaced."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from diffusion.data.spec import ImageSpec
from diffusion.errors import DataError, RecipeError, nearest
from diffusion.features.identity import accepts
from diffusion.recipe import Part, Recipe
from diffusion.trust.reading import read_file
from diffusion.trust.redaction import first_line, shown

LONGEST_OVERRIDE = 10_000
"""Characters of a value that is typed as text."""
LARGEST_FILE = 1 << 20
"""Bytes of a recipe's file."""
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
"""Of a recipe, without its ending: the name becomes part of the runs' names."""


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("diffusion").joinpath("presets").iterdir()
        if entry.name.endswith(".yaml")
    )


def recipe_name(preset: str) -> str:
    """The name of the recipe that `preset` means: the preset's own, or the file's without folder and ending."""
    return Path(preset).stem if is_file_name(preset) else preset


def is_file_name(preset: str) -> bool:
    """Whether it means a file of the user's."""
    return preset.endswith((".yaml", ".yml"))


def load_recipe(preset: str, overrides: dict[str, Any] | None = None, seed: int | None = None) -> Recipe:
    """The recipe of a preset, or of a YAML file of the same kind, with single values replaced.

    `load_recipe("demo", {"network.width": 96})`, `load_recipe("path/to/mine.yaml")`. Raises RecipeError for a preset, file
    or key that is not there, with the nearest valid name, for a file that is no such YAML, and for a value that does not fit.
    """
    if is_file_name(preset):
        values = _read(Path(preset).expanduser())
    elif preset in preset_names():
        values = yaml.safe_load(files("diffusion").joinpath("presets", f"{preset}.yaml").read_text(encoding="utf-8"))
    else:
        raise RecipeError(
            f"There is no preset '{shown(preset)}': {nearest(preset, preset_names())} A recipe of your own is named by its "
            "path, which ends with .yaml."
        )
    values["name"] = recipe_name(preset)
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    if seed is not None:
        if "seed" in values:
            raise RecipeError(
                f"The recipe '{shown(preset)}' or an override sets seed, a parameter of the run: -p seed=5, in the demo --seed 5."
            )
        values["seed"] = seed
    recipe = _checked(values, f"'{shown(preset)}'{' with these overrides' if overrides else ''}")
    _check_effects(recipe)
    return recipe


def with_evaluation(recipe: Recipe, overrides: dict[str, Any]) -> Recipe:
    """The recipe with other values of `evaluation`, named with that word before the dot or without. Raises RecipeError."""
    values = recipe.model_dump(mode="json")
    for key, value in overrides.items():
        _override(values, key if key.startswith("evaluation.") else f"evaluation.{key}", value)
    changed = _checked(values, f"'{recipe.name}' with these values")
    asked = any(key.removeprefix("evaluation.") == "guidance" for key in overrides)
    if asked and changed.evaluation.guidance != 1 and not changed.network.class_conditional:
        raise RecipeError("evaluation.guidance is for networks that know classes, and this one knows none.")
    return changed


def _checked(values: dict[str, Any], which: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}".removeprefix(": ") for problem in error.errors()
        )
        raise RecipeError(f"The recipe {which} can't be used: {problems}.") from error
    if (
        recipe.needs_class and recipe.evaluation.guidance != 1
    ):  # not a rule of recipes: what was trained so stays readable
        raise RecipeError(
            f"evaluation.guidance is {recipe.evaluation.guidance:g}, which asks the network what it makes of an image without "
            "a class; with network.label_dropout 0 it never learns that. Set label_dropout above 0 (0.1), or guidance to 1."
        )
    _check_evaluation(recipe)
    return recipe


def _check_effects(recipe: Recipe) -> None:
    """What was asked for and would change nothing, or another thing than meant."""
    objective, evaluation = recipe.objective, recipe.evaluation
    idle = {
        "objective.weighting is for objective.loss simple or hybrid": objective.loss == "vlb"
        and objective.weighting != "none",
        "objective.error absolute is for objective.loss simple or hybrid": objective.loss == "vlb"
        and objective.error == "absolute",
        "objective.gamma above 2 is for objective.weighting min_snr; p2 takes 0.5 or 1 (Choi et al. 2022, arXiv:2204.00227)": (
            objective.weighting == "p2" and objective.gamma > 2
        ),
        "evaluation.guidance needs network.class_conditional": evaluation.guidance != 1
        and not recipe.network.class_conditional,
    }
    for sentence, holds in idle.items():
        if holds:
            raise RecipeError(f"{sentence}: as it is, it would not do what it says.")


FEWEST_SAMPLES = 10
"""By which figures mean anything: each is looked for among the five nearest of the others, and FID is fitted to a third of them."""


def _check_evaluation(recipe: Recipe) -> None:
    """What an evaluation would fail by, after the training. No rule of recipes: what was trained so stays readable."""
    evaluation = recipe.evaluation
    if not evaluation.extractors or len({*evaluation.extractors}) < len(evaluation.extractors):
        raise RecipeError("evaluation.extractors must name at least one extractor, and none twice.")
    if evaluation.samples < FEWEST_SAMPLES:
        raise RecipeError(f"evaluation.samples is {evaluation.samples}; figures need {FEWEST_SAMPLES} samples or more.")


def fit_to_dataset(recipe: Recipe, overrides: dict[str, Any], spec: ImageSpec) -> Recipe:
    """The recipe for images of such a kind: what a preset says of size, classes and extractors gives way to what they are.

    Nothing of a recipe that fits changes. Raises RecipeError where the overrides ask for what the images can't be.
    """
    data, network, evaluation = recipe.data, recipe.network, recipe.evaluation
    if spec.size % data.image_size:
        size = None if "data.image_size" in overrides else _nearest_size(recipe, spec.size)
        if size is None:
            raise RecipeError(
                f"data.image_size {data.image_size} does not fit: images of {spec.size} x {spec.size} are averaged down by a whole "
                f"factor, and what is left must be halved {len(network.multipliers) - 1} times after patches of {network.patch}. "
                'Set data.image_size, or bring the images to another size: -p source_options=\'{"size": 64, "fit": "crop"}\'.'
            )
        data = data.model_copy(update={"image_size": size})
    if network.class_conditional and not spec.classes:
        if overrides.get("network.class_conditional"):
            raise RecipeError("network.class_conditional is true, and the images have no classes.")
        for key, value, without in (
            ("network.label_dropout", network.label_dropout, 0.0),
            ("evaluation.guidance", evaluation.guidance, 1.0),
        ):
            if key in overrides and value != without:
                raise RecipeError(f"{key} is {value:g}, which is for images of classes, and these have none.")
        network = network.model_copy(update={"class_conditional": False, "label_dropout": 0.0})
        evaluation = evaluation.model_copy(update={"guidance": 1.0})
    refused = [name for name in evaluation.extractors if not accepts(name, spec)]
    if refused:
        if "evaluation.extractors" in overrides:
            raise RecipeError(
                f"evaluation.extractors names {refused[0]}, which is for other images than these. Use own, which is trained on them."
            )
        extractors = dict.fromkeys("own" if name in refused else name for name in evaluation.extractors)
        evaluation = evaluation.model_copy(update={"extractors": tuple(extractors)})
    if recipe.objective.alignment and not set(evaluation.extractors[1:]) & {"eurosat", "own"}:
        raise RecipeError(
            "objective.alignment is for images with a judge beside their own extractor, and of these recipes' extractors only own is "
            "for such images. Set evaluation.extractors to [inception, own] if they are RGB, else objective.alignment to 0."
        )
    if recipe.learned_variance and not spec.counted:
        raise RecipeError(
            f"objective.loss {recipe.objective.loss} needs the likelihood in bits, which images of {spec.dtype} have not. Use simple."
        )
    changed = {"data": data, "network": network, "evaluation": evaluation}
    return Recipe.model_validate(recipe.model_copy(update=changed).model_dump())


def _nearest_size(recipe: Recipe, size: int) -> int | None:
    """The largest size up to the recipe's to which such images can be averaged down."""
    smallest = recipe.network.patch * 2 ** (len(recipe.network.multipliers) - 1)
    fitting = [size // factor for factor in range(1, size + 1) if size % factor == 0 and size // factor % smallest == 0]
    return max((one for one in fitting if 8 <= one <= recipe.data.image_size), default=None)


def _read(path: Path) -> dict[str, Any]:
    """What a recipe's file holds: its keys are known, its values not yet looked at."""
    where = shown(str(path))
    if not FILE_NAME.fullmatch(path.stem):
        raise RecipeError(
            f"The recipe {where} can't be used: its name becomes part of the runs' names. Letters, digits, - and _, 40 at most."
        )
    if path.stem in preset_names():
        raise RecipeError(
            f"The recipe {where} has the name of a preset, and its runs would be taken for the preset's. Rename it."
        )
    if not path.exists():
        raise RecipeError(f"There is no recipe at {where}, looked for from {Path.cwd()}.")
    try:
        values = yaml.safe_load(read_file(path, LARGEST_FILE))
    except DataError as error:
        raise RecipeError(str(error)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"The recipe {where} is no YAML: {_reason(error)}.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"The recipe {where} has no keys: it must look like diffusion/presets/demo.yaml.")
    keys = recipe_keys()
    for name, value in values.items():
        for key in [f"{name}.{inner}" for inner in value] if isinstance(value, dict) else [str(name)]:
            if key not in keys and not (name in Recipe.model_fields and _is_part(name) and key == name):
                raise RecipeError(f"The recipe {where} has an unknown key '{shown(key)}': {nearest(key, keys)}")
    # A part whose lines are all commented out is one of defaults.
    return {name: value for name, value in values.items() if not (value is None and _is_part(name))}


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    keys = recipe_keys()
    if key not in keys:
        raise RecipeError(f"There is no recipe value '{shown(str(key))}': {nearest(str(key), keys)}")
    *parts, last = key.split(".")
    for part in parts:
        values = values.setdefault(part, {})
    values[last] = _as_in_yaml(key, value) if isinstance(value, str) else value


def _as_in_yaml(key: str, text: str) -> Any:
    """A value typed as text (a command line, a form) means what it would mean in a YAML file."""
    if len(text) <= LONGEST_OVERRIDE:
        try:
            return yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates and numbers that are none
            reason = _reason(error)
    else:
        reason = f"{len(text):,} characters"
    raise RecipeError(f"The value of {key}, '{shown(text, 40)}', can't be read: {reason}.")


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return first_line(error)


def recipe_keys() -> list[str]:
    """Every key that an override may name, dotted."""
    keys = []
    for name, field in Recipe.model_fields.items():
        if _is_part(name):
            assert isinstance(field.annotation, type)
            assert issubclass(field.annotation, Part)
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
        elif name not in ("name", "start"):
            keys.append(name)
    return keys


def _is_part(name: str) -> bool:
    part = Recipe.model_fields[name].annotation
    return isinstance(part, type) and issubclass(part, Part)
