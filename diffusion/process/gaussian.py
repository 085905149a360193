"""Gaussians: the forward process's posterior, KL terms in closed form, and the discretised decoder. All in nats.

Call these with float64 tensors: at small noise variance the differences that they take lose all digits in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.process.prediction import coefficients, over_pixels
from diffusion.process.schedule import noise_variance, signal


def log_one_minus_ratio(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """log(1 - r), r = SNR_t / SNR_s < 1, float64: the share of x_s that a step back from t must find anew."""
    return torch.log(-torch.expm1((log_snr_t - log_snr_s).double()))


def posterior(x0: Tensor, x_t: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (like x_t) and variance ([batch, 1, 1, 1] or scalar) of q(x_s | x_t, x_0), s before t.

    Ho et al. 2020, eq. 7, written with log_snr: with r = SNR_t / SNR_s,
    mean = r (alpha_s / alpha_t) x_t + (1 - r) alpha_s x0, variance = (1 - r) v_s.
    """
    log_ratio = (log_snr_t - log_snr_s).double()
    alpha_s, alpha_t = signal(log_snr_s.double()), signal(log_snr_t.double())
    # r alpha_s / alpha_t = (alpha_t / alpha_s) v_s / v_t stays finite where alpha_t = 0.
    on_x_t = alpha_t / alpha_s * noise_variance(log_snr_s.double()) / noise_variance(log_snr_t.double())
    on_x0 = -torch.expm1(log_ratio) * alpha_s
    mean = over_pixels(on_x_t, x_t).to(x_t) * x_t + over_pixels(on_x0, x_t).to(x_t) * x0
    return mean, over_pixels(-torch.expm1(log_ratio) * noise_variance(log_snr_s.double()), x_t)


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) elementwise, in nats, >= 0."""
    difference = log_variance_1 - log_variance_2
    return 0.5 * (torch.expm1(difference) - difference + (mean_1 - mean_2).square() * torch.exp(-log_variance_2))


def prior_kl(x0: Tensor, log_snr_last: Tensor) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)) elementwise, in nats."""
    alpha, sigma = coefficients(log_snr_last, x0)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    return gaussian_kl(alpha * x0, 2 * torch.log(sigma), zero, zero)


def discretised_log_likelihood(
    x: Tensor, mean: Tensor, std: Tensor, bin_width: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """log of the mass that N(mean, std^2) gives to the bin of each value of x, elementwise, in nats, <= 0.

    The bins are centred on the values and `bin_width` wide; those of the lowest and highest value reach to infinity
    (Ho et al. 2020, eq. 13). All arguments broadcast against x.
    """
    upper = (x + bin_width / 2 - mean) / std
    lower = (x - bin_width / 2 - mean) / std
    infinity = torch.full_like(upper, math.inf)
    upper = torch.where(x > high - bin_width / 2, infinity, upper)
    lower = torch.where(x < low + bin_width / 2, -infinity, lower)
    # A bin to the right of the mean is mirrored, so that both tails are computed where they are small.
    flip = lower > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1(torch.clamp(log_lower - log_upper, max=-1e-30)))
