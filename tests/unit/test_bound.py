"""The variational bound of Gaussian data under the optimal denoiser is the entropy, up to the chain's coarseness."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.process.bound import PixelBins, chain_term, prior_term, transition_term
from diffusion.process.gaussian import posterior
from diffusion.process.prediction import diffuse
from diffusion.process.reverse import Estimate, reverse
from diffusion.process.schedule import Cosine, chain, noise_variance, signal

STD = 0.8
BIN = 0.002  # well below the noise of the first step, so that the decoder adds nothing of its own


def optimal(x: Tensor, log_snr: Tensor) -> Tensor:
    alpha, v = (f(log_snr).reshape(-1, 1, 1, 1) for f in (signal, noise_variance))
    return alpha * STD**2 / (alpha**2 * STD**2 + v) * x


def bound(steps: int, images: int = 400, learned: bool = False) -> float:
    """Monte Carlo over images and noise, exact sum over timesteps; nats a dimension."""
    rng = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(images, 1, 4, 4, generator=rng, dtype=torch.float64)

    x0 = (STD * normal() / BIN).round() * BIN
    levels = chain(Cosine(8.0, -11.0), steps)
    limit = torch.full((1, 1, 1), 100.0, dtype=torch.float64)
    bins = PixelBins(torch.full((1, 1, 1), BIN, dtype=torch.float64), -limit, limit)
    total = prior_term(x0, levels[-1].expand(images))
    for t in range(steps):
        x_t = diffuse(x0, normal(), levels[t])
        position = torch.full((images,), t)
        estimate = Estimate(optimal(x_t, levels[t]), true_mix(levels, t, x_t) if learned else None)
        total = total + chain_term(estimate, x0, x_t, position, levels, bins)
    return float(total.mean())


def true_mix(levels: Tensor, t: int, like: Tensor) -> Tensor:
    """Where between its bounds the variance of the true p(x_s | x_t) lies for Gaussian data."""
    now, before, lowest = levels[t], levels[max(t - 1, 0)], levels[max(t, 1)]
    of_x0 = STD**2 * noise_variance(now) / (signal(now) ** 2 * STD**2 + noise_variance(now))
    if t == 0:
        low, high = -torch.expm1(lowest - now) * noise_variance(now), noise_variance(now)
        right = of_x0
    else:
        share = -torch.expm1(now - before)
        low, high = share * noise_variance(before), share * noise_variance(now)
        right = low + (share * signal(before)) ** 2 * of_x0
    return (torch.log(right / low) / torch.log(high / low)).expand_as(like)


def test_the_bound_reaches_the_entropy_from_above_as_the_chain_gets_finer() -> None:
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(BIN)
    coarse, fine = bound(600), bound(1200)
    assert coarse > fine > entropy - 0.03  # 0.03: three standard errors of the Monte Carlo estimate
    # The gap falls as 1 / T: extrapolated, it closes.
    assert 2 * fine - coarse == pytest.approx(entropy, abs=0.03)


def test_with_the_true_variances_a_short_chain_reaches_the_entropy() -> None:
    """For Gaussian data every p(x_s | x_t) is a Gaussian: nothing is lost, however coarse the chain is."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(BIN)
    assert bound(40, learned=True) == pytest.approx(entropy, abs=0.03)
    assert bound(40) > entropy + 0.1


def test_a_transition_term_is_the_difference_of_snr_times_the_error() -> None:
    """Kingma et al. 2021, eq. 13: KL = (SNR(s) - SNR(t)) |x_0 - x_0'|^2 / 2."""
    x0 = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64)
    t, s = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    x_t = diffuse(x0, torch.zeros_like(x0), t)
    term = transition_term(Estimate(torch.full_like(x0, 0.1)), x0, x_t, t, s)
    assert float(term) == pytest.approx((math.exp(1.5) - math.exp(1.0)) * 0.3**2 / 2, rel=1e-12)


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_an_x0_clipped_to_what_pixels_can_be_is_never_further_from_the_posterior(
    guess: list[float], true: list[float]
) -> None:
    x0, said = (torch.tensor(values, dtype=torch.float64).reshape(1, 1, 2, 2) for values in (true, guess))
    t, s = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    x_t = diffuse(x0, torch.ones_like(x0), t)
    clipped, raw = (transition_term(Estimate(one), x0, x_t, t, s) for one in (said.clamp(-1, 1), said))
    assert float(clipped) <= float(raw) + 1e-12


def test_the_learned_variance_runs_from_the_posterior_s_to_the_forward_transition_s() -> None:
    t, s = torch.tensor([1.0, -3.0], dtype=torch.float64), torch.tensor([1.5, 2.0], dtype=torch.float64)
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    _, low = posterior(x, x, t, s)
    _, at_0 = reverse(Estimate(x, torch.zeros_like(x)), x, t, s)
    _, fixed = reverse(Estimate(x), x, t, s)
    _, at_1 = reverse(Estimate(x, torch.ones_like(x)), x, t, s)
    forward = 1 - (signal(t) / signal(s)) ** 2  # beta of the step from s to t
    torch.testing.assert_close(torch.exp(at_0), low.expand_as(x))
    torch.testing.assert_close(torch.exp(fixed), low)
    torch.testing.assert_close(torch.exp(at_1), forward.reshape(2, 1, 1, 1).expand_as(x))


@pytest.mark.parametrize("position", [0, 1, 5, 9])
def test_gradients_of_the_bound_by_finite_differences(position: int) -> None:
    """With respect to x0 and to the mix; the first step is the decoder's, and its neighbours' gradients stay finite."""
    rng = torch.Generator().manual_seed(position)
    levels = chain(Cosine(4.0, -6.0), 10)
    x0 = (torch.rand(2, 3, 2, 2, generator=rng, dtype=torch.float64) * 10).round() / 5 - 1
    x_t = diffuse(x0, torch.randn(x0.shape, generator=rng, dtype=torch.float64), levels[position])
    one = torch.ones(3, 1, 1, dtype=torch.float64)
    bins = PixelBins(0.2 * one, -one, one)
    guess = (x0 + 0.3 * torch.randn(x0.shape, generator=rng, dtype=torch.float64)).requires_grad_()
    mix = torch.rand(x0.shape, generator=rng, dtype=torch.float64).requires_grad_()
    at = torch.tensor([position, 3])  # beside another step: both branches are there
    assert torch.autograd.gradcheck(lambda g, m: chain_term(Estimate(g, m), x0, x_t, at, levels, bins), (guess, mix))
    terms = chain_term(Estimate(guess, mix).detached_mean(), x0, x_t, at, levels, bins)
    of_mix, of_guess = torch.autograd.grad(terms.sum(), (mix, guess), allow_unused=True)
    assert torch.isfinite(of_mix).all()
    assert of_mix.abs().max() > 0
    assert of_guess is None, "detached, it teaches the variance alone"
    assert (
        not torch.autograd.grad(chain_term(Estimate(guess, mix), x0, x_t, at, levels, bins).sum(), guess)[0]
        .isnan()
        .any()
    )
