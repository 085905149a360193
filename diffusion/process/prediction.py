"""What the network predicts: x0, epsilon or v. Each converts exactly into the others, given x_t and its log_snr.

x_t = alpha x0 + sigma epsilon,    v = alpha epsilon - sigma x0    (Salimans & Ho 2022, arXiv:2202.00512, eq. 11)
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.process.choices import Prediction
from diffusion.process.schedule import noise_variance, signal


def over_pixels(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of images, [batch], as [batch, 1, 1, 1] to go with `like`; a scalar stays one."""
    return values.reshape((-1,) + (1,) * (like.dim() - 1)) if values.dim() else values


def coefficients(log_snr: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma = sqrt(v), computed in float64, shaped [batch, 1, 1, 1] (or scalar) and typed to go with `like`."""
    alpha, sigma = signal(log_snr.double()), noise_variance(log_snr.double()).sqrt()
    return over_pixels(alpha, like).to(like), over_pixels(sigma, like).to(like)


def diffuse(x0: Tensor, epsilon: Tensor, log_snr: Tensor) -> Tensor:
    """Draw from q(x_t | x_0): alpha x0 + sigma epsilon."""
    alpha, sigma = coefficients(log_snr, x0)
    return alpha * x0 + sigma * epsilon


def target(prediction: Prediction, x0: Tensor, epsilon: Tensor, log_snr: Tensor) -> Tensor:
    """What a perfect network would give, like x0: that itself, the noise, or v (Salimans & Ho 2022, arXiv:2202.00512)."""
    if prediction == "x0":
        return x0
    if prediction == "epsilon":
        return epsilon
    alpha, sigma = coefficients(log_snr, x0)
    return alpha * epsilon - sigma * x0


def to_x0(prediction: Prediction, output: Tensor, x_t: Tensor, log_snr: Tensor) -> Tensor:
    """x0 from the network's output. At log_snr = -inf an epsilon prediction does not determine x0: that divides by zero."""
    if prediction == "x0":
        return output
    alpha, sigma = coefficients(log_snr, x_t)
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    return alpha * x_t - sigma * output


def to_epsilon(prediction: Prediction, output: Tensor, x_t: Tensor, log_snr: Tensor) -> Tensor:
    """epsilon from the network's output."""
    if prediction == "epsilon":
        return output
    alpha, sigma = coefficients(log_snr, x_t)
    if prediction == "x0":
        return (x_t - alpha * output) / sigma
    return sigma * x_t + alpha * output


def loss_weight(prediction: Prediction, weight_of_x0: Tensor, log_snr: Tensor) -> Tensor:
    """Turn a weight on the squared error of x0 into the one on the squared error of the prediction that means the same.

    |x0 - x0'|^2 = |eps - eps'|^2 / SNR = v^2 |v - v'|^2 with v^2 the noise variance.
    """
    if prediction == "x0":
        return weight_of_x0
    if prediction == "epsilon":
        return weight_of_x0 * torch.exp(-log_snr)
    return weight_of_x0 * noise_variance(log_snr)
