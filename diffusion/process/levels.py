"""Which noise levels: those that a training batch sees, and those that a sampler visits. Both are values made here."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.choices import Spacing
from diffusion.process.schedule import Schedule


def stratified_uniforms(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """`count` numbers in (0, 1), each alone uniform, together one in each of `count` equal intervals, in random order.

    The low-discrepancy sampler of Kingma et al. 2021 (arXiv:2107.00630, appendix I.1).
    """
    values = (rng.random() + np.arange(count)) / count % 1.0
    return np.clip(rng.permutation(values), 1e-12, 1 - 1e-12)


def log_normal(uniforms: Tensor, mean: float, std: float, low: float, high: float) -> Tensor:
    """log_snr drawn from N(mean, std^2), limited to [low, high] (Karras et al. 2022, arXiv:2206.00364, table 1).

    There ln sigma ~ N(P_mean, P_std^2) for data of standard deviation sigma_data; for data of unit variance
    log_snr = -2 ln(sigma / sigma_data).
    """
    normal = torch.special.ndtri(uniforms)
    return (mean + std * normal).clamp(low, high)


def cells_of_log_normal(chain: Tensor, mean: float, std: float) -> Tensor:
    """How much of N(mean, std^2) lies nearest to each log_snr of a chain: [T], float64, adding up to 1.

    The ends of the chain take what lies beyond them. chain: [T], falling, finite.
    """
    middles = (chain[:-1] + chain[1:]) / 2
    above = torch.special.ndtr((middles - mean) / std)
    zero, one = torch.zeros_like(chain[:1]), torch.ones_like(chain[:1])
    return -torch.cat([one, above, zero]).diff()


def sampling_levels(schedule: Schedule, steps: int, spacing: Spacing, rho: float = 7.0) -> Tensor:
    """log_snr at the `steps` network evaluations of a sampler, from noise to data: float64 [steps], rising.

    The first is always the schedule's last time: a sampler that starts later loses the variety of brightness.

    uniform_time: the times i / steps, i = steps..1, of a schedule of fewer steps all that it has.  uniform_log_snr: even in log_snr.
    karras: sigma^(1/rho) even, sigma = exp(-log_snr / 2) (Karras et al. 2022, eq. 5).
    """
    if spacing == "uniform_time":
        return torch.unique_consecutive(schedule.log_snr(torch.arange(steps, 0, -1, dtype=torch.float64) / steps))
    ends = schedule.log_snr(torch.tensor([1.0, 1e-12], dtype=torch.float64))
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "uniform_log_snr":
        return ends[0] + (ends[1] - ends[0]) * ramp
    noisiest, cleanest = (math.exp(-0.5 * float(end) / rho) for end in ends)
    return -2 * rho * torch.log(noisiest + (cleanest - noisiest) * ramp)
