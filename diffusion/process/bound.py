"""The variational bound on the negative log likelihood, term by term, in nats a dimension.

    -log p(x_0) <= KL(q(x_T | x_0) || p(x_T)) + sum_{t=2..T} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_1)

(Ho et al. 2020, eq. 5). Everything is float64 but the network's own call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.gaussian import discretised_log_likelihood, gaussian_kl, posterior, prior_kl
from diffusion.process.reverse import Estimate, decoder_log_variance, reverse


@dataclass(frozen=True)
class PixelBins:
    """The bins of images' levels in the space that the process runs in. Tensors of shape [bands, 1, 1], float64."""

    width: Tensor
    low: Tensor
    high: Tensor


def prior_term(x0: Tensor, log_snr_last: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)): [batch], nats a dimension."""
    return prior_kl(x0, log_snr_last).flatten(1).mean(1)


def transition_term(estimate: Estimate, x0: Tensor, x_t: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)): [batch], nats a dimension. log_snr_t, log_snr_s: [batch], s before t."""
    x0, x_t = x0.double(), x_t.double()
    mean, variance = posterior(x0, x_t, log_snr_t, log_snr_s)
    predicted_mean, log_variance = reverse(_double(estimate), x_t, log_snr_t, log_snr_s)
    return gaussian_kl(mean, torch.log(variance), predicted_mean, log_variance).flatten(1).mean(1)


def decoder_term(estimate: Estimate, x0: Tensor, log_snr_1: Tensor, log_snr_2: Tensor, bins: PixelBins) -> Tensor:
    """-log p(x_0 | x_1), the discretised decoder: [batch], nats a dimension. log_snr_1, log_snr_2: of t = 1 and 2."""
    x0 = x0.double()
    std = torch.exp(0.5 * decoder_log_variance(estimate, x0, log_snr_1, log_snr_2))
    log_likelihood = discretised_log_likelihood(x0, estimate.x0.double(), std, bins.width, bins.low, bins.high)
    return -log_likelihood.flatten(1).mean(1)


def chain_term(
    estimate: Estimate, x0: Tensor, x_t: Tensor, position: Tensor, levels: Tensor, bins: PixelBins
) -> Tensor:
    """The bound's term of step t = position + 1 of a chain: the decoder's for t = 1, else the transition's: [batch].

    Args:
        position: [batch], in 0..T-1.
        levels: log_snr of the chain, [T], falling.
    """
    first = position == 0
    now = position.clamp(min=1)
    transition = transition_term(estimate, x0, x_t, levels[now], levels[now - 1])
    # Where it isn't the first step, the decoder is asked about x0 itself: its gradient must be finite, since 0 * inf is not 0.
    own = first.reshape(-1, 1, 1, 1)
    asked = Estimate(
        torch.where(own, estimate.x0.double(), x0.double()),
        None if estimate.mix is None else torch.where(own, estimate.mix, torch.ones_like(estimate.mix)),
    )
    decoder = decoder_term(asked, x0, levels[0], levels[1], bins)
    return torch.where(first, decoder, transition)


def _double(estimate: Estimate) -> Estimate:
    return Estimate(estimate.x0.double(), None if estimate.mix is None else estimate.mix.double())
