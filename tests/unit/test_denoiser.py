"""Drawing samples: the same whoever shares the work, and guided by the formula."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.denoiser import Denoiser, build_network
from diffusion.pixels import Pixels
from tests.conftest import tiny_recipe
from tests.specs import RGB_SPEC

PIXELS = Pixels(RGB_SPEC)


def denoiser(**overrides: object) -> Denoiser:
    recipe = tiny_recipe(**overrides)
    network = build_network(recipe, RGB_SPEC).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return Denoiser(recipe, network, PIXELS)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp"])
def test_sample_i_is_the_same_whatever_it_is_drawn_with(sampler: str) -> None:
    """To one grey level: how many images a network sees at once changes how it rounds."""
    drawn = denoiser(evaluation__sampler=sampler, evaluation__eta=0.5)
    labels = np.arange(12) % 10
    together = drawn.sample(range(12), labels, seed=3)
    apart = [drawn.sample(range(i, i + 3), labels[i : i + 3], seed=3) for i in range(0, 12, 3)]
    assert np.abs(together.astype(int) - np.concatenate(apart).astype(int)).max() <= 1
    assert np.array_equal(together, drawn.sample(range(12), labels, seed=3))
    assert not np.array_equal(together, drawn.sample(range(12), labels, seed=4))
    assert len({image.tobytes() for image in together}) == 12


def test_eta_makes_ddim_draw_noise() -> None:
    images = [denoiser(evaluation__sampler="ddim", evaluation__eta=eta).sample(range(2), None, 0) for eta in (0.0, 1.0)]
    assert not np.array_equal(images[0], images[1])


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_guidance_goes_on_from_the_unconditioned_prediction_and_keeps_the_conditioned_variance(loss: str) -> None:
    model = denoiser(objective__loss=loss, process__prediction="x0")
    x, level = 0.1 * torch.randn(2, 3, 16, 16), torch.tensor(-8.0, dtype=torch.float64)
    label = torch.tensor([1, 7])

    def unclipped(told: Tensor | None) -> Tensor:
        return model.network(x, torch.sigmoid(-level).expand(2), told)[:, :3]

    with_class, without = unclipped(label), unclipped(None)
    low, high = PIXELS.limits(x)
    guided = model.predict(x, level, label, guidance=1.5)
    torch.testing.assert_close(guided.x0, (without + 1.5 * (with_class - without)).clamp(low, high))
    plain = model.predict(x, level, label)
    torch.testing.assert_close(plain.x0, with_class.clamp(low, high))
    if loss == "hybrid":
        assert plain.mix is not None
        assert guided.mix is not None
        assert torch.equal(guided.mix, plain.mix)
        assert plain.mix.std() > 0


def test_guidance_is_paid_for_and_felt_only_in_its_interval() -> None:
    """With it at no level the images are the unguided ones; at all, those without an interval; between, the passes are fewer."""

    def draw(guidance: float = 2.0, interval: tuple[float, float] | None = None) -> tuple[bytes, int]:
        chosen = {"evaluation__guidance": guidance, "evaluation__guidance_interval": interval}
        model, passes = denoiser(evaluation__sampler_steps=6, **chosen), 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        model.network.register_forward_hook(count)
        return model.sample(range(2), np.array([1, 2]), 0).tobytes(), passes

    unguided, everywhere = draw(guidance=1.0), draw()
    assert (unguided[1], everywhere[1]) == (6, 12)
    assert draw(interval=(1e7, 1e8)) == (unguided[0], 6)
    assert draw(interval=(0.0, 1e8)) == everywhere
    middle = draw(interval=(0.3, 3))
    assert 6 < middle[1] < 12
    assert middle[0] not in (unguided[0], everywhere[0])
