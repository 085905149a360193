"""The networks, their conditioning, and the moving average."""

import pytest
import torch
from torch import Tensor, nn

from diffusion.denoiser import build_network
from diffusion.model.ema import EMA
from diffusion.model.placement import place
from diffusion.model.seed_unet import SeedUNet
from diffusion.model.unet import UNet, UNetShape
from diffusion.recipe_files import load_recipe
from tests.specs import RGB_SPEC


def small_unet(classes: int = 10, patch: int = 1, outputs: int = 3) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        UNetShape(
            image_size=16,
            bands=3,
            width=16,
            multipliers=(1, 2),
            blocks=1,
            attention_below=8,
            patch=patch,
            classes=classes,
            dropout=0.0,
            outputs=outputs,
            turns=True,
        )
    )
    for parameter in network.parameters():  # wake the zero-initialised layers
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.mark.parametrize("preset", ["demo", "eurosat", "overnight", "seed"])
def test_a_preset_s_network_predicts_like_its_input_and_starts_at_zero(preset: str) -> None:
    recipe = load_recipe(preset)
    size = recipe.data.image_size
    network = build_network(recipe, RGB_SPEC)
    out = network(torch.randn(2, 3, size, size), torch.tensor([0.1, 0.9], dtype=torch.float64), torch.tensor([0, 10]))
    assert out.shape == (2, 3, size, size)
    assert out.abs().max() == 0


def test_the_seed_network_is_the_published_one() -> None:
    network = SeedUNet(3, (32, 64, 96, 128), 2)
    # The published summary lists 1,957,091 weights, 6,464 of them batch norm's statistics, which are no parameters here.
    assert sum(p.numel() for p in network.parameters()) == 1_950_627


@pytest.mark.parametrize("width", [8, 24, 40, 56, 72, 104, 112, 136])
def test_any_allowed_width_makes_a_network(width: int) -> None:
    recipe = load_recipe("demo", {"network.width": width, "network.multipliers": [1, 3]})
    build_network(recipe, RGB_SPEC)(torch.zeros(1, 3, 32, 32), torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("patch", [1, 2])
def test_images_of_a_batch_do_not_leak_into_one_another(patch: int) -> None:
    network = small_unet(patch=patch, outputs=6).double()
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    v, label = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), torch.tensor([1, 2, 10])
    turn = torch.tensor([0, 1, 3])
    together = network(x, v, label, turn)
    assert together.shape == (3, 6, 16, 16)
    changed = x.clone()
    changed[1] += 1
    v2, label2 = v.clone(), label.clone()
    v2[1], label2[1] = 0.2, 7
    others = network(changed, v2, label2, torch.tensor([0, 2, 3]))
    torch.testing.assert_close(together[[0, 2]], others[[0, 2]], rtol=1e-12, atol=1e-12)
    assert (together[1] - others[1]).abs().max() > 1e-3


def test_the_network_is_told_noise_variance_and_class() -> None:
    network = small_unet()
    x, v = torch.randn(1, 3, 16, 16), torch.tensor([0.5], dtype=torch.float64)
    base = network(x, v, torch.tensor([3]))
    assert (network(x, v + 0.01, torch.tensor([3])) - base).abs().max() > 1e-4
    assert (network(x, v, torch.tensor([4])) - base).abs().max() > 1e-4
    assert torch.equal(network(x, v, None), network(x, v, torch.tensor([10])))
    turned = [network(x, v, torch.tensor([3]), torch.tensor([quarters])) for quarters in range(4)]
    assert torch.equal(turned[0], base), "told nothing, it takes the image as not turned"
    assert all((other - base).abs().max() > 1e-4 for other in turned[1:])


def test_both_ends_of_the_noise_variance_stay_apart() -> None:
    network = small_unet()
    ends = torch.sigmoid(-torch.tensor([10.0, 9.0, -9.0, -10.0], dtype=torch.float64))
    told = network.condition(ends, None)
    distances = torch.cdist(told, told)
    assert distances[distances > 0].min() > 0.01 * distances.max()


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(123)
    first = build_network(load_recipe("demo", seed=4), RGB_SPEC).state_dict()
    before = torch.random.get_rng_state()
    second = build_network(load_recipe("demo", seed=4), RGB_SPEC).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is left alone
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_network(load_recipe("demo", seed=5), RGB_SPEC).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_ema_halves_an_old_weight_in_its_half_life() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    ema = EMA(network, half_life_images=1000, ramp=None)
    nn.init.zeros_(network.weight)
    for step in range(1, 101):
        ema.update(network, step * 10, batch_size=10)
    assert ema.network.state_dict()["weight"].item() == pytest.approx(0.5, rel=1e-5)


def test_a_ramped_ema_forgets_the_start() -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    ema = EMA(network, half_life_images=1e9, ramp=0.05)
    nn.init.zeros_(network.weight)
    for step in range(1, 101):
        ema.update(network, step * 10, batch_size=10)
    assert abs(ema.network.state_dict()["weight"].item()) < 1e-6


def test_ema_averages_batch_norm_statistics_and_copies_counters() -> None:
    network = nn.BatchNorm2d(2)
    ema = EMA(network, half_life_images=10, ramp=None)
    network.train()(torch.randn(8, 2, 4, 4) + 5)
    ema.update(network, 10, 10)
    averaged, trained = ema.network.state_dict(), network.state_dict()
    torch.testing.assert_close(averaged["running_mean"], trained["running_mean"] / 2)
    assert averaged["num_batches_tracked"].item() == 1


def demo_network() -> tuple[UNet, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    network = build_network(load_recipe("demo"), RGB_SPEC).eval()
    assert isinstance(network, UNet)
    for parameter in network.parameters():  # as large as trained weights, with the zero-initialised layers awake
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return network, torch.randn(4, 3, 32, 32), torch.rand(4, dtype=torch.float64), torch.arange(4)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@torch.no_grad()
def test_channels_last_and_bf16_keep_the_result() -> None:
    network, x, v, label = demo_network()
    expected = network(x, v, label)
    assert expected.std() > 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < relative_error(network(x, v, label), expected) < 0.02
    placed = place(network, torch.device("cpu"))
    assert relative_error(placed(x.contiguous(memory_format=torch.channels_last), v, label), expected) < 1e-5


@torch.no_grad()
def test_it_can_be_captured_whole_for_the_compiler() -> None:
    """The product compiles on GPUs alone, where the test below checks the result; what could not be compiled is seen here."""
    network, x, v, label = demo_network()
    expected = network(x, v, label)
    captured = torch.compile(network, backend="eager", fullgraph=True)
    assert relative_error(captured(x, v, label), expected) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu_compiled_in_bf16_it_keeps_the_result() -> None:
    network, x, v, label = demo_network()
    expected = network(x, v, label)
    device = torch.device("cuda")
    compiled = torch.compile(place(network, device))
    x, v, label = x.to(device), v.to(device), label.to(device)
    assert relative_error(compiled(x, v, label).cpu(), expected) < 1e-3  # TF32 may be in use
    with torch.autocast("cuda", torch.bfloat16):
        assert relative_error(compiled(x, v, label).cpu(), expected) < 0.02
