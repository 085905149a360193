"""The U-Net: down- and upsampling, skip connections, residual blocks, attention where the image is small.

Ronneberger et al. 2015 (arXiv:1505.04597); as a denoiser Ho et al. 2020; adaptive group norm and the order of the
blocks as in Dhariwal & Nichol 2021 (arXiv:2105.05233).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.model.embedding import SinusoidalEmbedding

HEAD_CHANNELS = 32
NOISE_FEATURES = 64


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """A block whose last layer is zero starts as the identity, which lets deep networks train from the first step."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _largest_divisor(number: int, at_most: int) -> int:
    return max(divisor for divisor in range(1, max(1, at_most) + 1) if number % divisor == 0)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_largest_divisor(channels, min(32, channels // 8)), channels)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm scaled and shifted by the condition, SiLU, dropout, conv; plus the input."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.conv_in = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.scale_and_shift = nn.Linear(condition, 2 * outputs)
        self.norm_out, self.dropout = _norm(outputs), nn.Dropout(dropout)
        self.conv_out = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = self.scale_and_shift(condition)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm_out(h), 1 + scale))
        return self.skip(x) + self.conv_out(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all pixels; plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = _largest_divisor(channels, channels // HEAD_CHANNELS)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(attended.reshape(batch, channels, height, width))


class Stage(nn.Module):
    """One residual block, with attention or without."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, condition, dropout)
        self.attention = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.attention(self.block(x, condition))


@dataclass(frozen=True)
class UNetShape:
    """What a U-Net is built for, and its size."""

    image_size: int
    """Height and width of the images."""
    bands: int
    """Their channels."""
    width: int
    """Channels at the highest resolution."""
    multipliers: tuple[int, ...]
    """Channels at each resolution, as multiples of `width`; the resolution halves between them."""
    blocks: int
    """Residual blocks at each resolution."""
    attention_below: int
    """Resolutions up to this have attention."""
    patch: int
    """Pixels of a patch x patch square become channels before the first layer (1: none)."""
    classes: int
    """How many there are; 0 makes the network unconditional."""
    dropout: float
    """Share of activations dropped in each block while training."""
    outputs: int
    """Channels of the output: as many as bands, or twice as many where a network speaks of two things."""
    turns: bool = False
    """Whether it is told by how many quarters an image was turned."""


class UNet(nn.Module):
    """Predicts from the noisy image and its noise variance."""

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        width, classes, dropout = shape.width, shape.classes, shape.dropout
        condition = 4 * width
        self.patch, self.classes = shape.patch, classes
        self.noise_embedding = SinusoidalEmbedding(NOISE_FEATURES)
        self.noise_mlp = nn.Sequential(
            nn.Linear(2 * NOISE_FEATURES, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        # The row after the last class means "no class given".
        self.class_embedding = nn.Embedding(classes + 1, condition) if classes else None
        self.turn_embedding = nn.Embedding(4, condition) if shape.turns else None

        resolution = shape.image_size // shape.patch
        channels = width
        self.conv_in = nn.Conv2d(shape.bands * shape.patch**2, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        for level, multiplier in enumerate(shape.multipliers):
            attention = resolution <= shape.attention_below
            stages = nn.ModuleList()
            for _ in range(shape.blocks):
                stages.append(Stage(channels, width * multiplier, condition, dropout, attention))
                channels = width * multiplier
                skips.append(channels)
            self.down.append(stages)
            if level < len(shape.multipliers) - 1:
                resolution //= 2
        self.middle_channels = channels
        self.middle = nn.ModuleList(
            [Stage(channels, channels, condition, dropout, True), Stage(channels, channels, condition, dropout, False)]
        )
        for level, multiplier in reversed(list(enumerate(shape.multipliers))):
            attention = resolution <= shape.attention_below
            stages = nn.ModuleList()
            for _ in range(shape.blocks + (level == 0)):
                stages.append(Stage(channels + skips.pop(), width * multiplier, condition, dropout, attention))
                channels = width * multiplier
            self.up.append(stages)
            resolution *= 2
        self.norm_out = _norm(channels)
        self.conv_out = _zero(nn.Conv2d(channels, shape.outputs * shape.patch**2, 3, padding=1))

    def condition(self, noise_variance: Tensor, label: Tensor | None, turn: Tensor | None = None) -> Tensor:
        """[batch, 4 width]: what every block is told."""
        v = noise_variance.double()
        # Near v = 0 and v = 1 the variance itself hardly moves while the task does: the angle of the cosine schedule,
        # arcsin(sqrt(v)) / (pi/2), spreads both ends.
        angle = torch.atan2(v.sqrt(), (1 - v).sqrt()) / (torch.pi / 2)
        features = torch.cat([self.noise_embedding(v), self.noise_embedding(angle)], dim=1)
        embedded = self.noise_mlp(features.to(self.conv_in.weight.dtype))
        if self.class_embedding is not None:
            if label is None:
                label = torch.full_like(noise_variance, self.classes, dtype=torch.long)
            embedded = embedded + self.class_embedding(label)
        if self.turn_embedding is not None:
            turn = torch.zeros_like(noise_variance, dtype=torch.long) if turn is None else turn
            embedded = embedded + self.turn_embedding(turn)
        return F.silu(embedded)

    def forward(
        self, x: Tensor, noise_variance: Tensor, label: Tensor | None = None, turn: Tensor | None = None
    ) -> Tensor:
        """Predict like x: [batch, outputs, image_size, image_size].

        Args:
            x: noisy images [batch, bands, image_size, image_size], of variance about one.
            noise_variance: [batch] in [0, 1], float64 for full resolution near one.
            label: class indices [batch]; `classes` (or None for all) means no class.
            turn: quarter turns [batch] in 0..3; None means 0 for all. Without `turns` it is not used.
        """
        condition = self.condition(noise_variance, label, turn)
        return self.from_middle(*self.to_middle(x, condition), condition)

    def to_middle(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The way down: the middle [batch, middle_channels, ...], where the image is smallest, and what the way up takes over."""
        h = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        skips = [h]
        for level, stages in enumerate(self.down):
            assert isinstance(stages, nn.ModuleList)
            if level > 0:
                h = F.avg_pool2d(h, 2)
            for stage in stages:
                h = stage(h, condition)
                skips.append(h)
        for stage in self.middle:
            h = stage(h, condition)
        return h, skips

    def from_middle(self, h: Tensor, skips: list[Tensor], condition: Tensor) -> Tensor:
        """The way up; takes the skips away one by one."""
        for level, stages in enumerate(self.up):
            assert isinstance(stages, nn.ModuleList)
            if level > 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            for stage in stages:
                h = stage(torch.cat([h, skips.pop()], dim=1), condition)
        out = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out
