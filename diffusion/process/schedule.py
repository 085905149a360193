"""Noise schedules: how log_snr falls as time runs from 0 (data) to 1 (noise). Everything in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def signal(log_snr: Tensor) -> Tensor:
    """alpha, the factor on x_0."""
    return torch.sigmoid(log_snr).sqrt()


def noise_variance(log_snr: Tensor) -> Tensor:
    """v = 1 - alpha^2, the variance of the noise."""
    return torch.sigmoid(-log_snr)


def noise_to_signal(log_snr: Tensor) -> float:
    """sigma = exp(-log_snr / 2) of one noise level: the noise's standard deviation beside data of variance one, unscaled."""
    return math.exp(-0.5 * float(log_snr))


def log_snr_of_log_alpha_bar(log_alpha_bar: Tensor) -> Tensor:
    """log(alpha_bar / (1 - alpha_bar)) from log(alpha_bar), without cancellation at either end."""
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


class Schedule(Protocol):
    """A noise schedule."""

    def log_snr(self, time: Tensor) -> Tensor:
        """log_snr at times in (0, 1], any shape, float64."""
        ...


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule in continuous time, cut to a range of log_snr.

    alpha(t) = cos(phi(t)), sqrt(v(t)) = sin(phi(t)), phi linear in t between the angles of the two ends
    (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; the cut as in Salimans & Ho 2022, arXiv:2202.00512).
    """

    log_snr_max: float
    log_snr_min: float

    def log_snr(self, time: Tensor) -> Tensor:
        first, last = (math.atan(math.exp(-0.5 * end)) for end in (self.log_snr_max, self.log_snr_min))
        return -2 * torch.log(torch.tan(first + (last - first) * time.double()))


@dataclass(frozen=True)
class Discrete:
    """A schedule of T steps. Step t = 1..T stands for the times in ((t - 1) / T, t / T].

    Args:
        table: log_snr of the steps 1..T, falling, float64 [T]; the last may be -inf (zero terminal SNR).
    """

    table: Tensor

    def log_snr(self, time: Tensor) -> Tensor:
        # The small allowance keeps t / T on step t where the product is rounded upwards.
        step = torch.ceil(time.double() * len(self.table) - 1e-9).long()
        return self.table.to(time.device)[step.clamp(1, len(self.table)) - 1]


def linear(steps: int) -> Discrete:
    """Ho et al. 2020, section 4: betas from 1e-4 to 0.02 at 1000 steps, scaled so that any T ends equally noisy."""
    scale = 1000 / steps
    betas = torch.linspace(1e-4 * scale, min(0.02 * scale, 0.999), steps, dtype=torch.float64)
    return Discrete(log_snr_of_log_alpha_bar(torch.log1p(-betas).cumsum(0)))


def cosine(steps: int, offset: float = 0.008, max_beta: float = 0.999) -> Discrete:
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar(t) = cos^2(((t/T + s) / (1 + s)) pi/2), betas clipped at 0.999."""
    time = torch.arange(steps + 1, dtype=torch.float64) / steps
    log_alpha_bar = 2 * torch.log(torch.cos((time + offset) / (1 + offset) * math.pi / 2).clamp(min=1e-300))
    log_one_minus_beta = log_alpha_bar.diff().clamp(min=math.log1p(-max_beta))
    return Discrete(log_snr_of_log_alpha_bar(log_one_minus_beta.cumsum(0)))


def zero_terminal_snr(schedule: Discrete) -> Discrete:
    """Shift and scale sqrt(alpha_bar) so that the last step is pure noise (Lin et al. 2023, arXiv:2305.08891, alg. 1)."""
    alpha = signal(schedule.table)
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return Discrete(log_snr_of_log_alpha_bar(2 * torch.log(alpha)))


def chain(schedule: Schedule, steps: int) -> Tensor:
    """log_snr of the T-step chain t = 1..T that the bound and the samplers walk on: float64 [T], falling."""
    return schedule.log_snr(torch.arange(1, steps + 1, dtype=torch.float64) / steps)
