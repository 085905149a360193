"""Where a network lives: its device, and the memory layout that convolutions are fastest in."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def place(network: M, device: torch.device) -> M:
    """Move the network to the device, its images laid out channels last."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
