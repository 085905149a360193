"""The optimisers: AdamW, or Muon for the weights of the blocks and AdamW for all else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from diffusion.recipe import Recipe
from diffusion.training.orthogonal import all_orthogonalised

BLOCKS = ("down.", "middle.", "up.")
MOMENTUM = 0.95
EPSILON = 1e-8


class UpdateRule(ABC):
    """Moves parameters along their gradients.

    Not PyTorch's class of that name, only its formulas: that class' first step imports the compiler, which costs each rank two
    seconds and 75 MB, also where nothing is ever compiled.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float) -> None:
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {parameter: {} for parameter in parameters}
        """What it remembers of each parameter; empty before the first step."""
        self.weight_decay = weight_decay

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """One step of all parameters that have a gradient."""


class AdamW(UpdateRule):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, by PyTorch's fused kernel."""

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float, betas: tuple[float, float]) -> None:
        super().__init__(parameters, weight_decay)
        self.betas = betas

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        for parameter, state in self.state.items():
            if parameter.grad is None:
                continue
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            parameters.append(parameter)
            gradients.append(parameter.grad)
            states.append(state)
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=EPSILON,
            maximize=False,
        )


class Muon(UpdateRule):
    """Steps by the orthogonalised momentum of each weight, a convolution's taken as a matrix [outputs, inputs x squares].

    The step is scaled by 0.2 sqrt(the larger side), which gives it the size of Adam's, so that both share a learning rate
    (Liu et al. 2025, arXiv:2502.16982, eq. 4). `torch.optim.Muon` does the same for matrices only and in bfloat16, which on
    CPUs takes twice as long.
    """

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        moving = [parameter for parameter in self.state if parameter.grad is not None]
        updates = [self._update(parameter) for parameter in moving]
        directions = all_orthogonalised([update.flatten(1) for update in updates])
        for parameter, update, direction in zip(moving, updates, directions, strict=True):
            step = direction * (0.2 * max(direction.shape) ** 0.5)
            parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.sub_(step.reshape(update.shape).movedim(-1, 1), alpha=learning_rate)

    def _update(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's momentum, its inputs' channels last as the weight lies in memory: flattened to a matrix it is no copy."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM).movedim(1, -1)


def make_optimizers(recipe: Recipe, parameters: dict[str, nn.Parameter]) -> list[UpdateRule]:
    """The optimisers of these parameters, by their names in the network, each parameter in one of them."""
    options = recipe.optimizer
    by_muon: list[nn.Parameter] = []
    by_adam: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        of_a_block = name.startswith(BLOCKS) and parameter.dim() >= 2
        (by_muon if options.kind == "muon" and of_a_block else by_adam).append(parameter)
    optimizers: list[UpdateRule] = [AdamW(by_adam, options.weight_decay, options.betas)]
    if by_muon:
        optimizers.append(Muon(by_muon, options.weight_decay))
    return optimizers
