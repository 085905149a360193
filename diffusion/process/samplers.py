"""Samplers: functions of (predict, x, levels, noise) that walk from noise to data and return x0.

`levels` are rising log_snr from `levels.sampling_levels`, one network evaluation each; after the last the prediction of
x0 is the result. `predict(x, log_snr)` estimates x0; `noise(k)` gives standard normal noise like x for step k.
Coefficients are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.process.choices import SamplerName
from diffusion.process.prediction import coefficients, to_epsilon
from diffusion.process.reverse import Predict, reverse

Noise = Callable[[int], Tensor]


def ancestral(predict: Predict, x: Tensor, levels: Tensor, noise: Noise) -> Tensor:
    """The learned reverse chain (Ho et al. 2020, algorithm 2), on any subset of times."""
    for k, (now, after) in enumerate(pairwise(levels)):
        mean, log_variance = reverse(predict(x, now), x, now, after)
        x = mean + torch.exp(0.5 * log_variance).to(x) * noise(k)
    return predict(x, levels[-1]).x0


def ddim(predict: Predict, x: Tensor, levels: Tensor, noise: Noise, eta: float = 0.0) -> Tensor:
    """Song et al. 2020 (arXiv:2010.02502), eq. 12: deterministic at eta = 0, the ancestral chain at eta = 1."""
    for k, (now, after) in enumerate(pairwise(levels)):
        x0 = predict(x, now).x0
        alpha_after, sigma_after = coefficients(after, x)
        epsilon = to_epsilon("x0", x0, x, now)
        share = eta**2 * -torch.expm1(now - after).to(x)  # of the new noise variance: fresh noise
        x = alpha_after * x0 + sigma_after * (1 - share).sqrt() * epsilon
        if eta > 0:
            x = x + sigma_after * share.sqrt() * noise(k)
    return predict(x, levels[-1]).x0


def dpmpp(predict: Predict, x: Tensor, levels: Tensor, noise: Noise) -> Tensor:
    """DPM-Solver++ (2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2): second order, deterministic, one evaluation a step.

    In their lambda = log_snr / 2 and h the step in it: x <- sigma'/sigma x - alpha' (e^-h - 1) D, with D the
    prediction extrapolated to the middle of the step.
    """
    before: tuple[Tensor, Tensor] | None = None
    for now, after in pairwise(levels):
        x0 = predict(x, now).x0
        _, sigma = coefficients(now, x)
        alpha_after, sigma_after = coefficients(after, x)
        h = (after - now) / 2
        middle = x0
        if before is not None:
            x0_before, h_before = before
            middle = x0 + (h / (2 * h_before)).to(x) * (x0 - x0_before)
        x = sigma_after / sigma * x - alpha_after * torch.expm1(-h).to(x) * middle
        before = x0, h
    return predict(x, levels[-1]).x0


SAMPLERS: dict[SamplerName, Callable[[Predict, Tensor, Tensor, Noise], Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpmpp": dpmpp,
}
