"""What a network computes, against PyTorch's own count of the operations that it runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion.denoiser import build_network
from diffusion.model.flops import BACKWARD, forward_flops
from diffusion.recipe_files import load_recipe
from tests.specs import RGB_SPEC


@pytest.mark.parametrize("preset", ["demo", "eurosat", "overnight", "seed"])
def test_the_count_is_that_of_the_operations(preset: str) -> None:
    recipe = load_recipe(preset, {"network.width": 16, "network.blocks": 1})
    size = recipe.data.image_size
    network = build_network(recipe, RGB_SPEC)
    x, variance = torch.randn(1, 3, size, size), torch.tensor([0.5], dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # as products of matrices, which PyTorch counts on CPUs
        with FlopCounterMode(display=False) as forward:
            out = network(x, variance)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    counted = forward_flops(network, 3, size)
    assert counted == forward.get_total_flops()
    # The first layer's input needs no gradient; all others' do.
    assert backward.get_total_flops() == pytest.approx(BACKWARD * counted, rel=0.05)
    assert network.training


def test_a_count_changes_nothing() -> None:
    network = build_network(load_recipe("demo", {"network.dropout": 0.5}), RGB_SPEC)
    before, drawn = {name: value.clone() for name, value in network.state_dict().items()}, torch.random.get_rng_state()
    assert forward_flops(network, 3, 32) == forward_flops(network, 3, 32)
    assert torch.equal(torch.random.get_rng_state(), drawn), "nothing random is drawn"
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
