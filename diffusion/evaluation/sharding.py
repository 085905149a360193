"""Sharing blocks of work out to the processes, and putting the results together in the blocks' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor


def gather_rows(accelerator: Accelerator, blocks: dict[int, Tensor], sizes: list[int], row: Tensor) -> NDArray[Any]:
    """The rows of all blocks, in the order of the blocks, on every process.

    Process p of P has computed the blocks p, p + P, p + 2P, …; block b has sizes[b] rows, each like `row`. The result is
    the same array for any number of processes.
    """
    processes = accelerator.num_processes
    rounds, rows = -(-len(sizes) // processes), max(sizes)
    # A collective needs equal shapes: every process sends as many blocks of as many rows, some of them padding.
    padded = torch.zeros((rounds, rows, *row.shape), dtype=row.dtype, device=accelerator.device)
    for block, values in blocks.items():
        padded[block // processes, : len(values)] = values
    gathered = accelerator.gather(padded).reshape(processes, rounds, rows, *row.shape).cpu().numpy()
    return np.concatenate([gathered[block % processes, block // processes, :size] for block, size in enumerate(sizes)])


def block_sizes(total: int, block: int) -> list[int]:
    """Cut `total` items into blocks of `block`, the last one smaller."""
    return [min(block, total - start) for start in range(0, total, block)]
