"""Levels of images as the process has them, and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.data.spec import Images, ImageSpec
from diffusion.errors import RecipeError
from diffusion.process.bound import PixelBins


@dataclass(frozen=True)
class Pixels:
    """The map between the levels of images and the space of the process, where every band has mean 0 and variance 1.

    Unit variance makes the network's input of variance one at every noise level, and its v-target too: the
    preconditioning of Karras et al. 2022 (arXiv:2206.00364, table 1) without a formula of its own. Mean and variance are those of
    the images as they were ingested: averaged down, they have a little less.
    """

    spec: ImageSpec

    def _columns(self, like: Tensor, *names: str) -> list[Tensor]:
        """Numbers of the spec, [bands, 1, 1] each."""
        return [
            torch.tensor(getattr(self.spec, name), dtype=torch.float64).reshape(-1, 1, 1).to(like) for name in names
        ]

    def encode(self, images: Images, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels [batch, height, width, bands] -> process space [batch, bands, height, width]."""
        levels = images if images.dtype == np.uint8 else images.astype(np.float32)
        pixels = torch.from_numpy(levels).permute(0, 3, 1, 2).to(dtype)
        low, high = self._columns(torch.empty(0, dtype=torch.float64), "low", "high")
        pixels = pixels.clamp(low.to(pixels), high.to(pixels))
        pixels = (pixels - low.to(pixels)) * (2 / (high - low)).to(pixels) - 1
        mean, std = self._columns(pixels, "mean", "std")
        return ((pixels - mean) / std).contiguous()

    def to_unit(self, x: Tensor) -> Tensor:
        """Process space -> levels in [-1, 1], clipped."""
        mean, std = self._columns(x, "mean", "std")
        return (x * std + mean).clamp(-1, 1)

    def decode(self, x: Tensor) -> Images:
        """Process space [batch, bands, height, width] -> levels [batch, height, width, bands] of the spec's dtype."""
        unit = self.to_unit(x).double()
        low, high = self._columns(unit, "low", "high")
        levels = low + (unit + 1) * ((high - low) / 2)
        if self.spec.counted:
            known = np.iinfo(self.spec.dtype)  # earlier versions let a source name levels that no image of it can have
            levels = levels.round().clamp(known.min, known.max)
        return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy().astype(self.spec.dtype)

    def limits(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """What the lowest and the highest level are in process space: [bands, 1, 1] each."""
        mean, std = self._columns(like, "mean", "std")
        return (-1 - mean) / std, (1 - mean) / std

    def bins(self, like: Tensor) -> PixelBins:
        """The bins of the levels in process space. Raises RecipeError if they are not counted: there are no bins then."""
        if not self.spec.counted:
            raise RecipeError(
                f"Images of {self.spec.dtype} have no likelihood in bits, which objective.loss vlb and hybrid need: use simple."
            )
        low, high = self.limits(like)
        lowest, highest = self._columns(low, "low", "high")
        return PixelBins(width=(high - low) / (highest - lowest), low=low, high=high)
