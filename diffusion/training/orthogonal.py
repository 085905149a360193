"""Orthogonalised matrices: how one is made, and how the processes of a training share the work."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix of the same singular vectors whose singular values all lie between about 0.7 and 1.2.

    Newton-Schulz iteration with the coefficients of Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural
    networks", kellerjordan.github.io/posts/muon), which lift small singular values fast and settle near one, not at it.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


def all_orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalised` of each. Every process holds the same matrices, makes its share, and gets the others' from them.

    The bits are those that each would have made of all by itself, whatever the number of processes.
    """
    if not dist.is_initialized():
        return [orthogonalised(matrix) for matrix in matrices]
    rank, owners = dist.get_rank(), share_out([_cost(matrix) for matrix in matrices], dist.get_world_size())
    made: dict[int, Tensor] = {}
    shares = []
    for process in range(dist.get_world_size()):
        indices = [index for index, owner in enumerate(owners) if owner == process]
        if not indices:
            continue
        sizes = [matrices[index].numel() for index in indices]
        share = matrices[0].new_empty(sum(sizes))  # one message
        for index, part in zip(indices, share.split(sizes), strict=True):
            made[index] = part.view(matrices[index].shape)
            if process == rank:
                made[index].copy_(orthogonalised(matrices[index]))
        shares.append((process, share))
    for request in [dist.broadcast(share, src=process, async_op=True) for process, share in shares]:
        request.wait()
    return [made[index] for index in range(len(matrices))]


def share_out(costs: list[int], processes: int) -> list[int]:
    """The process that does each piece of work: the costliest first, each to the one that has the least to do so far."""
    owners, load = [0] * len(costs), [0] * processes
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners


def _cost(matrix: Tensor) -> int:
    """Multiplications of an iteration."""
    small, large = sorted(matrix.shape)
    return small**2 * (2 * large + small)
