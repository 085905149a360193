"""Specs of images: levels to the space of the process and back, and what a network is made of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.data.codecs import decode, to_npy
from diffusion.data.sources.eurosat import CLASSES
from diffusion.denoiser import build_network
from diffusion.errors import RecipeError
from diffusion.pixels import Pixels
from diffusion.recipe_files import fit_to_dataset, load_recipe
from tests.conftest import tiny_recipe
from tests.specs import RGB_SPEC, spec


@given(st.integers(1, 16), st.sampled_from(["uint8", "uint16", "float32"]), st.integers(8, 20), st.integers(0, 999))
def test_encoding_and_decoding_are_inverse(bands: int, dtype: str, size: int, seed: int) -> None:
    rng, own = np.random.default_rng(seed), spec(bands, dtype)
    high = 1.0 if dtype == "float32" else np.iinfo(dtype).max
    images = (rng.random((2, size, size, bands)) * high).astype(dtype)
    assert np.array_equal(decode(to_npy(images[0]), "x").array, images[0])
    pixels = Pixels(own)
    encoded = pixels.encode(images, torch.float64)
    assert encoded.shape == (2, bands, size, size)
    low, top = pixels.limits(encoded)
    assert bool(((encoded >= low - 1e-9) & (encoded <= top + 1e-9)).all())
    back = pixels.decode(encoded)
    assert back.dtype == images.dtype
    np.testing.assert_allclose(back, images, atol=0 if own.counted else 1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_levels_beyond_the_measured_ones_count_as_these(dtype: str) -> None:
    own = spec(1, dtype, low=(100.0,), high=(200.0,), black=(100.0,) * 3, white=(200.0,) * 3)
    images = np.array([50, 100, 150, 200, np.iinfo(dtype).max], dtype).reshape(1, 1, 5, 1)
    assert Pixels(own).decode(Pixels(own).encode(images)).ravel().tolist() == [100, 100, 150, 200, 200]
    assert own.display(images)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_bins_are_as_many_as_levels() -> None:
    for own, steps in ((RGB_SPEC, 255), (spec(2, "uint16"), 65535)):
        bins = Pixels(own).bins(torch.zeros(1, dtype=torch.float64))
        assert ((bins.high - bins.low) / bins.width).round().unique().tolist() == [steps]
    assert RGB_SPEC.bits_of_no_model == 8
    assert spec(2, "uint16").bits_of_no_model == 16
    with pytest.raises(RecipeError, match="no likelihood in bits"):
        Pixels(spec(1, "float32")).bins(torch.zeros(1))


@pytest.mark.parametrize("bands", [1, 3, 13])
@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_networks_have_as_many_channels_as_bands(bands: int, loss: str) -> None:
    network = build_network(tiny_recipe(objective__loss=loss), spec(bands))
    out = network(torch.randn(2, bands, 16, 16), torch.tensor([0.1, 0.9], dtype=torch.float64))
    assert out.shape == (2, bands * (1 if loss == "simple" else 2), 16, 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"low": (255.0,) * 3, "high": (0.0,) * 3},
        {"shown": (0, 1, 3)},
        {"bands": 3, "low": (0.0,)},
        {"std": (0.0,) * 3},
        {"mean": (0.0,)},
        {"size": 4},
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        spec(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "preset", "expected"),
    [(64, "demo", 32), (64, "eurosat", 64), (28, "demo", 28), (96, "demo", 32), (100, "demo", 20)],
)
def test_a_preset_takes_the_size_that_the_images_allow(size: int, preset: str, expected: int) -> None:
    recipe = load_recipe(preset)
    fitted = fit_to_dataset(recipe, {}, spec(size=size))
    assert fitted.data.image_size == expected
    if expected == recipe.data.image_size:
        assert fitted == recipe, "nothing of a recipe that fits changes"


def test_a_preset_gives_way_to_what_the_images_are() -> None:
    recipe = load_recipe("demo")
    plain = fit_to_dataset(recipe, {}, spec(classes=()))
    assert (plain.network.class_conditional, plain.evaluation.guidance, plain.evaluation.extractors) == (
        False,
        1.0,
        ("own",),
    )
    assert fit_to_dataset(recipe, {}, spec(13, "uint16")).evaluation.extractors == ("own",)
    assert fit_to_dataset(recipe, {}, spec(classes=("a", "b"))).evaluation.extractors == ("own",)
    for overrides, own, said in (
        ({"data.image_size": 32}, spec(size=100), "data.image_size 32 does not fit"),
        ({}, spec(size=37), "does not fit"),
        ({"network.class_conditional": True}, spec(classes=()), "no classes"),
        ({"network.label_dropout": 0.2}, spec(classes=()), "label_dropout is 0.2, which is for images of classes"),
        ({"evaluation.guidance": 3}, spec(classes=()), "guidance is 3, which is for images of classes"),
        ({"evaluation.extractors": ["eurosat"]}, spec(1), "Use own"),
        ({"objective.loss": "vlb"}, spec(1, "float32"), "likelihood in bits"),
    ):
        with pytest.raises(RecipeError, match=said):
            fit_to_dataset(load_recipe("demo", overrides), overrides, own)


ROOT = Path(__file__).parents[2]
OF_AN_IMAGE = re.compile(r"(^|_)(bands?|channels?|(?<!digest_)size|classes|levels?)$")
OWN_INPUT = {
    "diffusion/data/codecs.py": "what formats hold",
    "diffusion/data/form.py": "the levels of 8-bit images, where the spec is made",
    "diffusion/data/manifest.py": "manifests of before there were specs",
    "diffusion/data/spec.py": "the display",
    "diffusion/evaluation/pictures.py": "colours of the sheet",
    "diffusion/features/extractor.py": "what the shipped networks eat",
}
"""Where 255 is said, and of what."""


def constants_of_images(path: Path) -> list[str]:
    """Numbers above 2 that code passes as, compares with or gives by default to what a dataset decides; its class names."""
    found = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg or "", node.value)]
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args]
            pairs = [(one.arg, value) for one, value in zip(reversed(named), reversed(node.defaults), strict=False)]
            pairs += [(one.arg, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        elif isinstance(node, ast.Compare):
            pairs = [(ast.unparse(node.left).rstrip(")"), value) for value in node.comparators]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("Conv2d", "Linear")):
            pairs = [("bands", node.args[0])]
        elif isinstance(node, ast.Constant) and (node.value in CLASSES or node.value in (255, 255.0, 127.5)):
            pairs = [("levels", node)]
        for name, value in pairs:
            if (
                OF_AN_IMAGE.search(name)
                and isinstance(value, ast.Constant)
                and (value.value in CLASSES or (isinstance(value.value, int | float) and value.value > 2))
            ):
                found.append(f"{name} {value.value} in line {value.lineno}")
    return found


def test_no_code_above_the_sources_knows_what_the_images_are() -> None:
    found = {}
    for folder in ("diffusion", "flows", "mlflow"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("diffusion/data/sources/") and name not in OWN_INPUT:
                found[name] = constants_of_images(path)
    assert len(found) > 80
    assert not {name: lines for name, lines in found.items() if lines}
