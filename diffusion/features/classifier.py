"""The small classifier whose penultimate activations are the features of `fid_eurosat`, and of what each dataset has of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

WIDTHS = (24, 48, 128)
FEATURES = WIDTHS[-1]
INPUT_SIZE = 64


class Conv(nn.Module):
    """3 x 3 convolution, then batch norm while training; once fused, the convolution alone."""

    def __init__(self, inputs: int, outputs: int, stride: int, fused: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=fused)
        self.norm: nn.Module = nn.Identity() if fused else nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Two convolutions and an identity (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.first, self.second = Conv(width, width, 1, fused), Conv(width, width, 1, fused)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Classifier(nn.Module):
    """A residual network of three resolutions (32, 16, 8); 0.13 GFLOP an image.

    Args:
        bands: of the images.
        classes: how many there are.
        fused: whether the batch norms are folded into the convolutions, as in the weights that are shipped.
    """

    def __init__(self, bands: int, classes: int, fused: bool) -> None:
        super().__init__()
        small, middle, large = WIDTHS
        self.trunk = nn.Sequential(
            Conv(bands, small, 2, fused),
            nn.ReLU(),
            Block(small, fused),
            Conv(small, middle, 2, fused),
            nn.ReLU(),
            Block(middle, fused),
            Block(middle, fused),
            Conv(middle, large, 2, fused),
            nn.ReLU(),
            Block(large, fused),
            Block(large, fused),
        )
        self.head = nn.Linear(FEATURES, classes)

    def feature_map(self, images: Tensor) -> Tensor:
        """Features [batch, 128, 8, 8] of images [batch, bands, height, width]; other sizes are resized to 64 x 64.

        The shipped weights know pixels in [-1, 1], a dataset's own those of mean 0 and variance 1.
        """
        if images.shape[-2:] != (INPUT_SIZE, INPUT_SIZE):
            images = F.interpolate(images, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", antialias=True)
        return self.trunk(images)

    def features(self, images: Tensor) -> Tensor:
        """Features [batch, 128], averaged over the image."""
        return self.feature_map(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [batch, classes]."""
        return self.head(self.features(images))


@torch.no_grad()
def fuse(network: Classifier) -> Classifier:
    """The same function as `network` in evaluation mode, with every batch norm folded into its convolution."""
    first = network.trunk[0]
    assert isinstance(first, Conv)
    fused = Classifier(first.conv.in_channels, network.head.out_features, fused=True)
    for source, target in zip(network.modules(), fused.modules(), strict=False):
        if not isinstance(source, Conv):
            continue
        assert isinstance(target, Conv)
        assert isinstance(source.norm, nn.BatchNorm2d)
        target.conv = fuse_conv_bn_eval(source.conv.eval(), source.norm.eval())
    fused.head.load_state_dict(network.head.state_dict())
    return fused.eval()
