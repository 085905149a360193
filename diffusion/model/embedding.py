"""Sinusoidal embedding of the noise variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MIN_FREQUENCY, MAX_FREQUENCY = 1.0, 1000.0


class SinusoidalEmbedding(nn.Module):
    """sin and cos of 2 pi f v at geometrically spaced frequencies f = 1..1000 (Vaswani et al. 2017, for a real number).

    Args:
        dimensions: size of the embedding, even.
    """

    frequencies: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        logs = torch.linspace(math.log(MIN_FREQUENCY), math.log(MAX_FREQUENCY), dimensions // 2, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi * logs.exp()).float(), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """[batch] numbers in [0, 1] -> [batch, dimensions]."""
        angles = value[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)
