"""The optimisers: AdamW, or Muon for the weights of the blocks and AdamW for all else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.recipe import Recipe

BLOCKS = ("down.", "middle.", "up.")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95


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


class Muon(torch.optim.Optimizer):
    """Steps by the orthogonalised momentum of each weight, a convolution's taken as a matrix [outputs, inputs x squares].

    The step is scaled by 0.2 sqrt(the larger side), which gives it the size of Adam's, so that both share a learning rate
    (Liu et al. 2025, arXiv:2502.16982, eq. 4). `torch.optim.Muon` does the same for matrices only and in bfloat16, which on
    CPUs takes twice as long.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - MOMENTUM)
                update = parameter.grad.lerp(momentum, MOMENTUM)
                # Channels last, as the weight lies in memory: the matrix is no copy.
                last = update.movedim(1, -1)
                matrix = last.reshape(len(last), -1)
                step = orthogonalised(matrix) * (0.2 * max(matrix.shape) ** 0.5)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(step.reshape(last.shape).movedim(-1, 1), alpha=group["lr"])


def make_optimizers(recipe: Recipe, network: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers of a network's parameters, each parameter in one of them."""
    options = recipe.optimizer
    by_muon: list[nn.Parameter] = []
    by_adam: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        of_a_block = name.startswith(BLOCKS) and parameter.dim() >= 2
        (by_muon if options.kind == "muon" and of_a_block else by_adam).append(parameter)
    adam: dict[str, Any] = {"betas": options.betas, "weight_decay": options.weight_decay, "fused": True}
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(by_adam, **adam)]
    if by_muon:
        optimizers.append(Muon(by_muon, options.weight_decay))
    return optimizers
