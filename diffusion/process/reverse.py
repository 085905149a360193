"""The learned reverse transitions p(x_s | x_t), s before t: Gaussians made from what a network says about x_t."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.process.gaussian import log_one_minus_ratio, posterior
from diffusion.process.prediction import over_pixels
from diffusion.process.schedule import noise_variance


@dataclass(frozen=True)
class Estimate:
    """What a network says about noisy images."""

    x0: Tensor
    """The clean images that it expects, [batch, bands, height, width]."""
    mix: Tensor | None = None
    """Like x0: where the log variance of the reverse transitions lies, from 0, the posterior's, to 1, the forward
    transition's. None: at 0, not learned. A network is free to leave [0, 1]."""

    def detached_mean(self) -> Estimate:
        """The same with no gradient through x0: a loss on it teaches the variance alone."""
        return replace(self, x0=self.x0.detach())


Predict = Callable[[Tensor, Tensor], Estimate]
"""A network as samplers see it: (x_t, log_snr) -> Estimate."""


def reverse(estimate: Estimate, x_t: Tensor, log_snr_t: Tensor, log_snr_s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (like x_t) and log variance (like x_t, or [batch, 1, 1, 1], or scalar) of p(x_s | x_t).

    The mean is the posterior's at the expected x0 (Ho et al. 2020, eq. 7). The variance lies between the two bounds that
    hold whatever the data (Nichol & Dhariwal 2021, eq. 15): with r = SNR_t / SNR_s the posterior's, (1 - r) v_s, and the
    forward transition's, (1 - r) v_t. So its log is log(1 - r) + log v_s + mix (log v_t - log v_s).
    """
    mean, _ = posterior(estimate.x0, x_t, log_snr_t, log_snr_s)
    v_s, v_t = (over_pixels(noise_variance(level.double()), x_t) for level in (log_snr_s, log_snr_t))
    log_variance = over_pixels(log_one_minus_ratio(log_snr_t, log_snr_s), x_t) + torch.log(v_s)
    if estimate.mix is not None:
        log_variance = log_variance + estimate.mix.double() * torch.log(v_t / v_s)
    return mean, log_variance


def decoder_log_variance(estimate: Estimate, like: Tensor, log_snr_1: Tensor, log_snr_2: Tensor) -> Tensor:
    """Log variance of p(x_0 | x_1), shaped like that of `reverse`.

    The posterior's is zero there; in its place stands that of the transition before, q(x_1 | x_2, x_0) (Nichol & Dhariwal
    2021, section 3.1). Not learned, it is the forward transition's, v_1.
    """
    upper = over_pixels(torch.log(noise_variance(log_snr_1.double())), like)
    if estimate.mix is None:
        return upper
    lower = over_pixels(log_one_minus_ratio(log_snr_2, log_snr_1), like) + upper
    return lower + estimate.mix.double() * (upper - lower)
