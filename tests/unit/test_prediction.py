"""Predictions convert exactly, and the weighted losses of all three mean the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.process.choices import Prediction, Weighting
from diffusion.process.objective import simple_loss, weight
from diffusion.process.prediction import diffuse, target, to_epsilon, to_x0

PREDICTIONS: list[Prediction] = ["epsilon", "x0", "v"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(log_snr=st.floats(-15, 15), seed=st.integers(0, 2**31))
def test_a_perfect_prediction_gives_back_image_and_noise(prediction: Prediction, log_snr: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x0, epsilon = torch.randn(2, 2, 3, 4, 4, generator=rng, dtype=torch.float64)
    level = torch.full((2,), log_snr, dtype=torch.float64)
    x_t = diffuse(x0, epsilon, level)
    output = target(prediction, x0, epsilon, level)
    # Dividing by a small signal (or noise) magnifies rounding by as much.
    tolerance = 1e-13 * max(1, torch.exp(level.abs().max() / 2).item())
    torch.testing.assert_close(to_x0(prediction, output, x_t, level), x0, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(to_epsilon(prediction, output, x_t, level), epsilon, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@given(log_snr=st.floats(-8, 8), error=st.floats(0.01, 1))
def test_a_weight_means_the_same_error_whatever_is_predicted(weighting, log_snr: float, error: float) -> None:  # type: ignore[no-untyped-def]
    level = torch.tensor([log_snr], dtype=torch.float64)
    x0, epsilon = torch.zeros(2, 1, 3, 2, 2, dtype=torch.float64)
    x_t = diffuse(x0, epsilon, level)
    wrong_x0 = x0 + error
    losses = []
    for prediction in PREDICTIONS:
        wrong_epsilon = to_epsilon("x0", wrong_x0, x_t, level)
        output = target(prediction, wrong_x0, wrong_epsilon, level)
        aim = target(prediction, x0, epsilon, level)
        losses.append(float(simple_loss(output, aim, weight(weighting, prediction, level, gamma=5.0))))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_min_snr_for_v_is_the_clamped_snr_over_snr_plus_one() -> None:
    log_snr = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    snr = log_snr.exp()
    torch.testing.assert_close(weight("min_snr", "v", log_snr, gamma=5.0), snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(weight("min_snr", "epsilon", log_snr, gamma=5.0), snr.clamp(max=5) / snr)


def test_p2_is_the_published_weight_on_epsilon() -> None:
    log_snr = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(weight("p2", "epsilon", log_snr, gamma=0.5), (1 + log_snr.exp()) ** -0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2"])
def test_gradients_of_the_simple_loss_by_finite_differences(prediction: Prediction, weighting: Weighting) -> None:
    rng = torch.Generator().manual_seed(0)
    output, x0, epsilon = (torch.randn(3, 2, 2, 2, generator=rng, dtype=torch.float64) for _ in range(3))
    log_snr = torch.tensor([-6.0, 0.3, 5.0], dtype=torch.float64)
    output.requires_grad_()
    aim, by = target(prediction, x0, epsilon, log_snr), weight(weighting, prediction, log_snr, gamma=5.0)
    assert torch.autograd.gradcheck(lambda out: simple_loss(out, aim, by), (output,))
