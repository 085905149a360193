"""Adding up the gradients of the lanes: `exact` along a fixed binary tree, so that the sum's bits know no processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientBuffer:
    """All gradients of a network as views of one flat tensor, which makes adding and sending them one operation each."""

    def __init__(self, network: nn.Module) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        first = parameters[0]
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=first.dtype, device=first.device)
        offset = 0
        for parameter in parameters:
            # A gradient in its parameter's own memory layout keeps the optimiser's fast path.
            parameter.grad = self.flat[offset:].as_strided(parameter.size(), parameter.stride(), offset)
            offset += parameter.numel()


class Tree:
    """Adds equally shaped tensors pairwise, like the counter of a tournament: ((0+1)+(2+3))+((4+5)+(6+7))."""

    def __init__(self) -> None:
        self._partial: list[tuple[int, Tensor]] = []

    def add(self, value: Tensor) -> None:
        """Add the next leaf. The tensor is kept: give a copy."""
        level = 0
        while self._partial and self._partial[-1][0] == level:
            value = self._partial.pop()[1].add_(value)
            level += 1
        self._partial.append((level, value))

    def sum(self) -> Tensor:
        """The sum of a power-of-two number of leaves."""
        ((_, total),) = self._partial
        return total


def sum_over_processes(value: Tensor) -> Tensor:
    """Continue the tree over the processes by recursive doubling: after level k, 2^(k+1) neighbours hold their sum.

    Both sides of a pair add the same two numbers, and a + b = b + a exactly, so all processes end with the same bits,
    which are those that one process would get from all leaves. The number of processes is a power of two.
    """
    if not dist.is_initialized():
        return value
    rank, distance = dist.get_rank(), 1
    received = torch.empty_like(value)
    while distance < dist.get_world_size():
        partner = rank ^ distance
        exchange = [dist.P2POp(dist.isend, value, partner), dist.P2POp(dist.irecv, received, partner)]
        for request in dist.batch_isend_irecv(exchange):
            request.wait()
        value = value + received
        distance *= 2
    return value
