"""One of several processes that share Muon's matrices out: `python -m tests.sharing FOLDER`, with RANK and WORLD_SIZE."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from diffusion.training.orthogonal import all_orthogonalised, orthogonalised

SHAPES = [(16, 144), (144, 16), (8, 8), (24, 216), (48, 24)]


def main(folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = dist.FileStore(str(folder / "meeting"), processes)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=processes)
    torch.manual_seed(0)  # all hold the same
    for count in (0, 1, 5):
        matrices = [torch.randn(shape) for shape in SHAPES[:count]]
        shared, alone = all_orthogonalised(matrices), [orthogonalised(matrix) for matrix in matrices]
        assert len(shared) == count
        assert all(torch.equal(mine, expected) for mine, expected in zip(shared, alone, strict=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
