"""How much a training computes, and how near that is to what its machine can: the model FLOPs utilisation
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from diffusion.model.unet import Attention

BACKWARD = 2.0
"""A backward pass computes about twice as much as the forward pass: a gradient of the weights and one of the input."""
PEAK_SECONDS, PEAK_PRODUCTS = 0.05, 5


@torch.no_grad()
def forward_flops(network: nn.Module, bands: int, size: int) -> float:
    """FLOPs of one image's way through the network: products and sums of convolutions, linear layers and attention."""
    total = 0.0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, Attention):  # every pixel with every other: their products, and the sum that these weigh
            total += 4 * inputs[0].numel() * inputs[0][0, 0].numel()
        else:
            assert isinstance(layer.weight, Tensor)
            total += 2 * output.numel() * layer.weight[0].numel()

    counted = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear, Attention))]
    hooks = [layer.register_forward_hook(add) for layer in counted]
    training, device = network.training, next(network.parameters()).device
    try:
        x = torch.zeros(1, bands, size, size, device=device)
        network.eval()(x, torch.full((1,), 0.5, device=device, dtype=torch.float64))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return total


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two matrices on this process's threads, or its GPU: what it can do at most, about."""
    side = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    seconds, began = list[float](), 0.0
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as convolutions compute
    try:
        while len(seconds) < PEAK_PRODUCTS or time.perf_counter() - began < PEAK_SECONDS:
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
            began = began or time.perf_counter()  # the first one warms up
        # Others may keep the cores busy just now: a product takes milliseconds, and some are not interrupted.
        return 2.0 * side**3 / min(seconds)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
