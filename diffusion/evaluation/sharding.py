"""Sharing blocks of work out to the processes, and putting the results together in the blocks' order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor


def share_out(
    accelerator: Accelerator,
    sizes: list[int],
    compute: Callable[[int, range], Tensor],
    like: Tensor,
    report: Callable[[int, int], None] = lambda done, mine: None,
) -> NDArray[Any]:
    """The rows of all blocks, in the order of the blocks, on every process: the same array for any number of processes.

    Process p of P computes the blocks p, p + P, p + 2P, …

    Args:
        sizes: how many rows each block has.
        compute: the rows of a block, of its number and which of all rows they are.
        like: a row, for its shape and dtype.
        report: is told how many of this process's blocks are done, and how many it has.
    """
    starts = [0, *itertools.accumulate(sizes)]
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    blocks = {}
    for done, block in enumerate(mine, start=1):
        blocks[block] = compute(block, range(starts[block], starts[block + 1]))
        report(done, len(mine))
    return _gather(accelerator, blocks, sizes, like)


def _gather(accelerator: Accelerator, blocks: dict[int, Tensor], sizes: list[int], like: Tensor) -> NDArray[Any]:
    processes, rows, found = accelerator.num_processes, max(sizes), []
    for first in range(0, len(sizes), processes):  # a block of each process: no more has to fit into a GPU's memory
        # A collective needs equal shapes: every process sends as many rows, some of them padding.
        padded = torch.zeros((1, rows, *like.shape), dtype=like.dtype, device=accelerator.device)
        values = blocks.get(first + accelerator.process_index)
        if values is not None:
            padded[0, : len(values)] = values
        gathered = accelerator.gather(padded).cpu().numpy()
        found += [block[:size] for block, size in zip(gathered, sizes[first : first + processes], strict=False)]
    return np.concatenate(found)


def block_sizes(total: int, block: int) -> list[int]:
    """Cut `total` items into blocks of `block`, the last one smaller."""
    return [min(block, total - start) for start in range(0, total, block)]
