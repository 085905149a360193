"""Sharing blocks of work out to the processes, and putting the results together in the blocks' order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
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
    processes, rows, found = accelerator.num_processes, max(sizes), list[NDArray[Any]]()
    for first in range(0, len(sizes), processes):  # a block of each process: no more has to fit into a GPU's memory
        own = blocks.get(first + accelerator.process_index)
        found += _gathered(accelerator, own, sizes[first : first + processes], rows, like)
    return np.concatenate(found)


def in_turns(
    accelerator: Accelerator,
    sizes: list[int],
    compute: Callable[[int], Tensor],
    like: Tensor,
    report: Callable[[int, int], None] = lambda done, mine: None,
) -> Iterator[NDArray[Any]]:
    """As `share_out`, block by block: no process has more than one of each in memory at once."""
    processes, rows = accelerator.num_processes, max(sizes)
    mine = len(range(accelerator.process_index, len(sizes), processes))
    for turn, first in enumerate(range(0, len(sizes), processes), start=1):
        block = first + accelerator.process_index
        own = compute(block) if block < len(sizes) else None
        report(min(turn, mine), mine)
        yield from _gathered(accelerator, own, sizes[first : first + processes], rows, like)


def _gathered(
    accelerator: Accelerator, own: Tensor | None, sizes: list[int], rows: int, like: Tensor
) -> list[NDArray[Any]]:
    """A block of each process, on every process. `own`: this one's, if it has any."""
    # A collective needs equal shapes: every process sends as many rows, some of them padding.
    padded = torch.zeros((1, rows, *like.shape), dtype=like.dtype, device=accelerator.device)
    if own is not None:
        padded[0, : len(own)] = own
    gathered = accelerator.gather(padded).cpu().numpy()
    return [block[:size] for block, size in zip(gathered, sizes, strict=False)]


def block_sizes(total: int, block: int) -> list[int]:
    """Cut `total` items into blocks of `block`, the last one smaller."""
    return [min(block, total - start) for start in range(0, total, block)]
