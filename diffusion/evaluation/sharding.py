"""Sharing blocks of work out to the processes, and putting the results together in the blocks' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor


def gather_rows(accelerator: Accelerator, blocks: dict[int, Tensor], sizes: list[int], row: Tensor) -> NDArray[Any]:
    """The rows of all blocks, wherever they lie, in the order of the blocks, on every process.

    Process p of P has computed the blocks p, p + P, p + 2P, …; block b has sizes[b] rows, each like `row`. The result is
    the same array for any number of processes.
    """
    processes, rows, found = accelerator.num_processes, max(sizes), []
    for first in range(0, len(sizes), processes):  # a block of each process: no more has to fit into a GPU's memory
        # A collective needs equal shapes: every process sends as many rows, some of them padding.
        padded = torch.zeros((1, rows, *row.shape), dtype=row.dtype, device=accelerator.device)
        values = blocks.get(first + accelerator.process_index)
        if values is not None:
            padded[0, : len(values)] = values
        gathered = accelerator.gather(padded).cpu().numpy()
        found += [block[:size] for block, size in zip(gathered, sizes[first : first + processes], strict=False)]
    return np.concatenate(found)


def block_sizes(total: int, block: int) -> list[int]:
    """Cut `total` items into blocks of `block`, the last one smaller."""
    return [min(block, total - start) for start in range(0, total, block)]
