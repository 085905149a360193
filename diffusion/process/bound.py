"""The variational bound on the negative log likelihood, term by term, in nats a dimension.

    -log p(x_0) <= KL(q(x_T | x_0) || p(x_T)) + sum_{t=2..T} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_1)

(Ho et al. 2020, eq. 5). The reverse transitions have the posterior's variance, the decoder the variance v_1.
Everything is float64 but the network's own call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.gaussian import discretised_log_likelihood, gaussian_kl, posterior, prior_kl
from diffusion.process.prediction import diffuse
from diffusion.process.samplers import Denoise
from diffusion.process.schedule import noise_variance


@dataclass(frozen=True)
class PixelBins:
    """The bins of 8-bit values in the space that the process runs in. Tensors of shape [channels, 1, 1], float64."""

    width: Tensor
    low: Tensor
    high: Tensor


def transition_term(denoise: Denoise, x0: Tensor, epsilon: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) at x_t made from `epsilon`: [batch], nats a dimension.

    log_snr_t, log_snr_s: [batch], s the step before t.
    """
    x_t = diffuse(x0, epsilon, log_snr_t)
    mean, variance = posterior(x0, x_t, log_snr_t, log_snr_s)
    predicted_mean, _ = posterior(denoise(x_t, log_snr_t).double(), x_t, log_snr_t, log_snr_s)
    log_variance = torch.log(variance)
    return gaussian_kl(mean, log_variance, predicted_mean, log_variance).flatten(1).mean(1)


def decoder_term(denoise: Denoise, x0: Tensor, epsilon: Tensor, log_snr_first: Tensor, bins: PixelBins) -> Tensor:
    """-log p(x_0 | x_1), the discretised decoder: [batch], nats a dimension. log_snr_first: [batch], all of t = 1."""
    predicted = denoise(diffuse(x0, epsilon, log_snr_first), log_snr_first).double()
    std = noise_variance(log_snr_first).sqrt().reshape(-1, 1, 1, 1)
    log_likelihood = discretised_log_likelihood(x0, predicted, std, bins.width, bins.low, bins.high)
    return -log_likelihood.flatten(1).mean(1)


def prior_term(x0: Tensor, log_snr_last: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)): [batch], nats a dimension."""
    return prior_kl(x0, log_snr_last).flatten(1).mean(1)
