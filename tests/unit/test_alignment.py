"""The second task of an aligned training: what it measures, whom it teaches, and what it leaves as it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.denoiser import build_network
from diffusion.errors import RecipeError
from diffusion.features.extractor import Teacher, load_teacher, shipped
from diffusion.features.identity import SHIPPED_SHA256, Known
from diffusion.model.unet import UNet
from diffusion.pixels import Pixels
from diffusion.recipe import Recipe
from diffusion.recipe_files import fit_to_dataset
from diffusion.training.alignment import Aligned
from tests.conftest import Ingested, tiny_recipe
from tests.specs import RGB_SPEC

CPU = torch.device("cpu")
EUROSAT = Known("eurosat", "eurosat", SHIPPED_SHA256)


def fixed(features: Tensor) -> Teacher:
    """One that sees this in whatever image."""
    return Teacher(SHIPPED_SHA256, lambda x0: features)


def aligned(ingested: Ingested, teacher: Teacher, recipe: Recipe | None = None) -> Aligned:
    network = build_network(recipe or tiny_recipe(), ingested.manifest.images)
    assert isinstance(network, UNet)
    return Aligned(network, teacher, seed=0)


def test_misalignment_is_one_minus_the_cosine_at_each_place(ingested: Ingested) -> None:
    seen = torch.randn(4, 128, 8, 8)
    measured, x0 = aligned(ingested, fixed(seen)).misalignment, torch.zeros(4, 3, 16, 16)
    assert torch.allclose(measured(seen * 7, x0), torch.zeros(4), atol=1e-6), "the same direction, however long"
    assert torch.allclose(measured(-seen, x0), torch.full((4,), 2.0), atol=1e-6)
    other = torch.randn_like(seen)
    by_hand = [
        np.mean([1 - float(a @ b) / np.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(p.T, q.T, strict=True)])
        for p, q in zip(other.flatten(2).numpy(), seen.flatten(2).numpy(), strict=True)
    ]
    assert np.allclose(measured(other, x0).numpy(), by_hand, atol=1e-6)
    assert torch.allclose(measured(other.bfloat16(), x0), measured(other, x0), atol=0.01), (
        "in float32, whatever comes in"
    )


def test_a_middle_of_another_size_is_compared_with_what_is_seen_resized(ingested: Ingested) -> None:
    everywhere, x0 = torch.randn(2, 128, 1, 1), torch.zeros(2, 3, 16, 16)
    module = aligned(ingested, fixed(everywhere.expand(-1, -1, 8, 8)))
    assert torch.allclose(module.misalignment(everywhere.expand(-1, -1, 4, 4), x0), torch.zeros(2), atol=1e-6)


def test_the_network_says_the_same_with_a_head_and_without(ingested: Ingested) -> None:
    module = aligned(ingested, fixed(torch.randn(2, 128, 8, 8)), tiny_recipe(network__attention_below=16))
    x, variance, label = torch.randn(2, 3, 16, 16), torch.tensor([0.1, 0.9]).double(), torch.tensor([1, 2])
    torch.nn.init.normal_(module.network.conv_out.weight)
    said, foretold = module(x, variance, label)
    assert torch.equal(said, module.network(x, variance, label))
    assert foretold.shape == (2, 128, 4, 4)


def test_the_middle_learns_what_the_teacher_sees_and_the_teacher_does_not(ingested: Ingested) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    teacher = load_teacher(EUROSAT, ingested.store, ingested.manifest, CPU)
    assert not teacher.see(images).requires_grad
    module = aligned(ingested, teacher)
    assert {name for name, _ in module.named_parameters() if not name.startswith("network.")} == {
        "alignment.weight",
        "alignment.bias",
    }
    optimizer, course = torch.optim.Adam(module.parameters(), 1e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module.misalignment(module(images, torch.full((4,), 0.5).double())[1], images).mean()
        loss.backward()
        optimizer.step()
        course.append(loss.item())
    assert module.network.conv_in.weight.grad is not None
    assert module.network.conv_in.weight.grad.abs().max() > 0, "by way of the network"
    assert course[-1] < 0.5 * course[0]


def test_the_teacher_sees_clean_images_as_the_extractor_does(ingested: Ingested) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    seen = load_teacher(EUROSAT, ingested.store, ingested.manifest, CPU).see(
        Pixels(ingested.manifest.images).encode(images)
    )
    assert seen.shape == (3, 128, 8, 8)
    assert torch.allclose(seen.mean((2, 3)), shipped(CPU).embed(images), atol=1e-4)


def test_it_goes_on_with_its_head_and_with_no_other_teacher(ingested: Ingested) -> None:
    teacher = fixed(torch.randn(2, 128, 8, 8))
    first, second = (Aligned(aligned(ingested, teacher).network, teacher, seed) for seed in (0, 1))
    assert not torch.equal(first.alignment.weight, second.alignment.weight)
    second.restore(first.state)
    assert torch.equal(first.alignment.weight, second.alignment.weight)
    second.teacher = replace(teacher, sha256="0" * 64)
    with pytest.raises(RecipeError, match="another extractor"):
        second.restore(first.state)


def test_what_can_t_be_aligned_is_refused() -> None:
    with pytest.raises(RecipeError, match="seed has no middle"):
        tiny_recipe(objective__alignment=0.5, network__kind="seed", network__class_conditional=False, data__lanes=1)
    with pytest.raises(RecipeError, match=r"needs two of evaluation\.extractors, as \[eurosat, own\]"):
        tiny_recipe(objective__alignment=0.5, evaluation__extractors=["own"])
    aligned = tiny_recipe(objective__alignment=0.5, evaluation__extractors=["eurosat", "own"])
    assert (aligned.aligned_with, tiny_recipe().aligned_with) == ("own", None)
    assert fit_to_dataset(aligned, {}, RGB_SPEC).aligned_with == "own"
    other = RGB_SPEC.model_copy(update={"classes": ("a", "b")})
    with pytest.raises(RecipeError, match=r"Set evaluation\.extractors to \[inception, own\] if they are RGB"):
        fit_to_dataset(aligned, {}, other)
    judged = tiny_recipe(objective__alignment=0.5, evaluation__extractors=["inception", "eurosat"])
    assert fit_to_dataset(judged, {}, other).aligned_with == "own"
