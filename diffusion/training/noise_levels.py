"""Which noise levels a training sees, drawn from uniforms, so that nothing random is kept here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.denoiser import make_schedule
from diffusion.process.levels import cells_of_log_normal, log_normal
from diffusion.process.schedule import Schedule, chain
from diffusion.recipe import Recipe

REMEMBERED = 10
"""Losses of each group of steps that the importance remembers, about (Nichol & Dhariwal 2021, section 3.3: 10)."""
GROUPS = 100
"""Neighbouring steps of the chain whose losses are remembered together."""
UNIFORM_SHARE = 0.001
"""Of the importance: no step is ever without a chance."""
BOUND_SHARE = 0.05
"""Of log-normal levels that a bound is learned from, those drawn evenly: no step weighs more than 20 times what it is."""


@dataclass(frozen=True)
class DrawnLevels:
    """The noise levels of a micro-batch."""

    log_snr: Tensor
    """[micro-batch], float64."""
    position: Tensor | None
    """Place of each in the chain, 0..T-1; None where levels are drawn from a continuum."""
    share: Tensor | None
    """The probability with which each position was drawn."""


class LevelSource:
    """Draws noise levels as a recipe says; for `importance` it learns from the losses which ones matter.

    Losses that are a bound need the steps of a chain: then, and for `importance`, the levels are those of the chain. What is
    remembered stays on the CPU: a GPU has no deterministic cumulative sum.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.objective, self.steps = recipe.objective, recipe.process.steps
        self.schedule: Schedule = make_schedule(recipe.process)
        self.learns = recipe.objective.noise_levels == "importance"
        self.on_chain = self.learns or recipe.learned_variance
        self.chain = chain(self.schedule, self.steps)
        groups = min(GROUPS, self.steps)
        self.group = torch.arange(self.steps) * groups // self.steps
        self.second_moment = torch.zeros(groups, dtype=torch.float64)
        self.seen = torch.zeros(groups, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, by name."""
        return {"second_moment": self.second_moment, "seen": self.seen} if self.learns else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` was."""
        for name, value in self.state.items():
            value.copy_(state[name])

    def shares(self) -> Tensor:
        """The probability of each position of the chain, [T]."""
        objective = self.objective
        uniform = torch.full_like(self.chain, 1 / self.steps)
        if objective.noise_levels == "log_normal":
            cells = cells_of_log_normal(self.chain, objective.log_snr_mean, objective.log_snr_std)
            return (1 - BOUND_SHARE) * cells + BOUND_SHARE * uniform
        if objective.noise_levels == "uniform" or bool((self.seen < REMEMBERED).any()):
            return uniform
        important = self.second_moment.sqrt()[self.group]
        return (1 - UNIFORM_SHARE) * important / important.sum() + UNIFORM_SHARE * uniform

    def draw(self, uniforms: Tensor) -> DrawnLevels:
        """Noise levels from numbers in (0, 1), [micro-batch], float64."""
        objective = self.objective
        if self.on_chain:
            shares, device = self.shares(), uniforms.device
            position = torch.searchsorted(shares.cumsum(0), uniforms.cpu(), right=True).clamp(max=self.steps - 1)
            return DrawnLevels(self.chain[position].to(device), position.to(device), shares[position].to(device))
        if objective.noise_levels == "uniform":
            return DrawnLevels(self.schedule.log_snr(uniforms), None, None)
        ends = self.schedule.log_snr(torch.tensor([1.0, 1e-12], dtype=torch.float64)).tolist()
        return DrawnLevels(log_normal(uniforms, objective.log_snr_mean, objective.log_snr_std, *ends), None, None)

    def observe(self, positions: Tensor, losses: Tensor) -> None:
        """Take in the losses of a whole batch, before they were weighted for how they were drawn: [batch] each.

        The second moment moves towards that of the new losses by the share that they have among `REMEMBERED`.
        """
        positions, losses = positions.cpu(), losses.cpu()
        member = torch.nn.functional.one_hot(self.group[positions], len(self.seen)).double()
        count = member.sum(dim=0)
        mean_square = (losses.double().square() @ member) / count.clamp(min=1)
        kept = (1 - 1 / REMEMBERED) ** count
        # The first losses of all are taken as they are.
        kept = torch.where(self.seen > 0, kept, (count == 0).double())
        self.second_moment.mul_(kept).add_((1 - kept) * mean_square)
        self.seen.add_(count)
