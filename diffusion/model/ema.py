"""Exponential moving average of the weights, with its half-life in images, not steps."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """Keeps the averaged network beside the trained one.

    Args:
        network: the network to follow; it is copied. Several averages may follow one.
        half_life_images: images after which an old weight counts half.
        ramp: the half-life is at most this share of the images seen so far, so that the start is forgotten soon
            (Karras et al. 2022, appendix F.2: 0.05); None for a constant half-life.
    """

    def __init__(self, network: nn.Module, half_life_images: float, ramp: float | None) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.half_life_images, self.ramp = half_life_images, ramp

    def decay(self, images_seen: int, batch_size: int) -> float:
        """The share of the old average that survives the step that ends at `images_seen`."""
        half_life = self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * images_seen)
        return 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards `network`. Statistics (batch norm's) are averaged like weights, counters are copied."""
        towards = 1 - self.decay(images_seen, batch_size)
        own, new = self.network.state_dict(), network.state_dict()
        floats = [name for name, value in own.items() if value.is_floating_point()]
        torch._foreach_lerp_([own[name] for name in floats], [new[name] for name in floats], towards)
        for name in own.keys() - set(floats):
            own[name].copy_(new[name])
