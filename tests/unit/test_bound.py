"""The variational bound of Gaussian data under the optimal denoiser is the entropy, up to the chain's coarseness."""

import math

import pytest
import torch
from torch import Tensor

from diffusion.process.bound import PixelBins, decoder_term, prior_term, transition_term
from diffusion.process.schedule import Cosine, chain, noise_variance, signal

STD = 0.8
BIN = 0.002  # well below the noise of the first step, so that the decoder adds nothing of its own


def optimal(x: Tensor, log_snr: Tensor) -> Tensor:
    alpha, v = (f(log_snr).reshape(-1, 1, 1, 1) for f in (signal, noise_variance))
    return alpha * STD**2 / (alpha**2 * STD**2 + v) * x


def bound(steps: int, images: int = 400) -> float:
    """Monte Carlo over images and noise, exact sum over timesteps; nats a dimension."""
    rng = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(images, 1, 4, 4, generator=rng, dtype=torch.float64)

    x0 = (STD * normal() / BIN).round() * BIN
    levels = chain(Cosine(8.0, -11.0), steps)
    limit = torch.full((1, 1, 1), 100.0, dtype=torch.float64)
    bins = PixelBins(torch.full((1, 1, 1), BIN, dtype=torch.float64), -limit, limit)
    total = prior_term(x0, levels[-1].expand(images)) + decoder_term(
        optimal, x0, normal(), levels[0].expand(images), bins
    )
    for t in range(1, steps):
        total = total + transition_term(optimal, x0, normal(), levels[t].expand(images), levels[t - 1].expand(images))
    return float(total.mean())


def test_the_bound_reaches_the_entropy_from_above_as_the_chain_gets_finer() -> None:
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(BIN)
    coarse, fine = bound(600), bound(1200)
    assert coarse > fine > entropy - 0.03  # 0.03: three standard errors of the Monte Carlo estimate
    # The gap falls as 1 / T: extrapolated, it closes.
    assert 2 * fine - coarse == pytest.approx(entropy, abs=0.03)


def test_a_transition_term_is_the_difference_of_snr_times_the_error() -> None:
    """Kingma et al. 2021, eq. 13: KL = (SNR(s) - SNR(t)) |x_0 - x_0'|^2 / 2."""
    x0 = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64)
    t, s = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    term = transition_term(lambda x, log_snr: torch.full_like(x, 0.1), x0, torch.zeros_like(x0), t, s)
    assert float(term) == pytest.approx((math.exp(1.5) - math.exp(1.0)) * 0.3**2 / 2, rel=1e-12)
