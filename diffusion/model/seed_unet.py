"""The network of the `seed` recipe: a small U-Net with batch norm, as in the Keras example on denoising diffusion
implicit models (A. Béres, 2022, keras.io/examples/generative/ddim), which this project grew from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.model.embedding import SinusoidalEmbedding

EMBEDDING = 32


class SeedBlock(nn.Module):
    """Batch norm without scale and shift, conv, swish, conv; plus the input (through a 1 x 1 convolution if it must)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.norm = nn.BatchNorm2d(inputs, affine=False, momentum=0.01, eps=1e-3)
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(F.silu(self.first(self.norm(x))))


class SeedUNet(nn.Module):
    """Widths 32/64/96/128, two blocks a level, noise-variance embedding of 32 dimensions laid out as an image.

    It has no class conditioning and no attention. Batch norm mixes the images of a batch, so a batch is one lane.
    """

    def __init__(self, bands: int, widths: tuple[int, ...], blocks: int) -> None:
        super().__init__()
        self.embedding = SinusoidalEmbedding(EMBEDDING)
        self.conv_in = nn.Conv2d(bands, widths[0], 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = widths[0] + EMBEDDING, []
        for width in widths[:-1]:
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(SeedBlock(channels, width))
                channels = width
                skips.append(channels)
            self.down.append(stages)
        self.middle = nn.Sequential(
            *(SeedBlock(channels if block == 0 else widths[-1], widths[-1]) for block in range(blocks))
        )
        channels = widths[-1]
        for width in reversed(widths[:-1]):
            stages = nn.ModuleList()
            for _ in range(blocks):
                stages.append(SeedBlock(channels + skips.pop(), width))
                channels = width
            self.up.append(stages)
        self.conv_out = nn.Conv2d(channels, bands, 1)
        nn.init.zeros_(self.conv_out.weight)
        for layer in self.modules():  # Keras' default initialisation
            if isinstance(layer, nn.Conv2d):
                if layer is not self.conv_out:
                    nn.init.xavier_uniform_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, noise_variance: Tensor, label: Tensor | None = None, turn: Tensor | None = None
    ) -> Tensor:
        """Predict like x [batch, bands, height, width]; noise_variance [batch] in [0, 1]; label and turn are not used."""
        told = self.embedding(noise_variance)[:, :, None, None].expand(-1, -1, *x.shape[2:]).to(x.dtype)
        h = torch.cat([self.conv_in(x), told], dim=1)
        skips = []
        for stages in self.down:
            assert isinstance(stages, nn.ModuleList)
            for block in stages:
                h = block(h)
                skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h)
        for stages in self.up:
            assert isinstance(stages, nn.ModuleList)
            h = F.interpolate(h, scale_factor=2.0, mode="bilinear")
            for block in stages:
                h = block(torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(h)
