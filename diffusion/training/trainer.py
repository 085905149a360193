"""The trainer: everything that changes while training, and how one step changes it."""

from __future__ import annotations

import contextlib
import logging
import shutil

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.denoiser import build_network
from diffusion.model.ema import EMA
from diffusion.model.placement import place
from diffusion.process.objective import simple_loss
from diffusion.process.prediction import diffuse
from diffusion.process.schedule import noise_variance
from diffusion.recipe import Recipe
from diffusion.training.batches import Lane
from diffusion.training.checkpoint import Checkpoint
from diffusion.training.reduction import GradientBuffer, Tree, sum_over_processes

log = logging.getLogger(__name__)


def lanes_of_process(recipe: Recipe, rank: int, processes: int) -> range:
    """The lanes that fall to one process: whole neighbouring subtrees of the tree. Raises RecipeError if they can't."""
    recipe.check_processes(processes)
    share = recipe.data.lanes // processes
    return range(rank * share, (rank + 1) * share)


def learning_rate(recipe: Recipe, images_seen: int) -> float:
    """The rate at a point of the budget: a function of images, not of steps or processes."""
    optimizer, budget = recipe.optimizer, recipe.data.images
    rate = optimizer.learning_rate
    if optimizer.decay == "cosine":
        rate *= 0.5 * (1 + np.cos(np.pi * min(1.0, images_seen / budget)))
    if images_seen < optimizer.warmup_images:
        rate *= images_seen / optimizer.warmup_images
    return float(rate)


def _can_compile(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        log.warning("There is no C compiler, which torch.compile needs: training runs uncompiled, and slower.")
        return False
    return True


class Trainer:
    """Everything that changes while training, and how one step changes it."""

    def __init__(self, recipe: Recipe, classes: int, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.lanes = lanes_of_process(recipe, accelerator.process_index, accelerator.num_processes)
        device = accelerator.device
        self.network = place(build_network(recipe, classes), device)
        self.ema = EMA(self.network, recipe.ema.half_life_images, recipe.ema.ramp)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            fused=True,
        )
        self.step = 0
        fast = recipe.reduction == "fast"
        # DistributedDataParallel is compiled with what it wraps: only so does it send while the backward pass runs.
        self.wrapped: nn.Module = accelerator.prepare_model(self.network) if fast else self.network
        self.forward = torch.compile(self.wrapped) if _can_compile(device) else self.wrapped
        self.gradients = None if fast else GradientBuffer(self.network)

    @property
    def images_seen(self) -> int:
        """Images behind the weights."""
        return self.step * self.recipe.data.batch_size

    def train_step(self, lanes: list[Lane]) -> tuple[list[Tensor], Tensor, float]:
        """One optimiser step. Returns the losses [micro-batch] of each lane, the gradient's norm, the learning rate."""
        recipe = self.recipe
        self.network.train()
        losses = self._exact_gradients(lanes) if self.gradients else self._fast_gradients(lanes)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.optimizer.clip_norm)
        rate = learning_rate(recipe, self.images_seen + recipe.data.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.network, self.images_seen, recipe.data.batch_size)
        return losses, norm, rate

    def _loss(self, lane: Lane) -> Tensor:
        recipe = self.recipe
        x_t = diffuse(lane.x0, lane.epsilon, lane.log_snr).contiguous(memory_format=torch.channels_last)
        if recipe.network.dropout:
            torch.manual_seed(lane.dropout_seed)  # dropout takes its numbers from the global generator only
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = self.forward(x_t, noise_variance(lane.log_snr), lane.label)
        objective = recipe.objective
        return simple_loss(
            output,
            lane.x0,
            lane.epsilon,
            lane.log_snr,
            recipe.process.prediction,
            objective.weighting,
            objective.gamma,
            objective.error,
        )

    def _exact_gradients(self, lanes: list[Lane]) -> list[Tensor]:
        assert self.gradients is not None
        flat, tree, losses = self.gradients.flat, Tree(), []
        for lane in lanes:
            flat.zero_()
            loss = self._loss(lane)
            loss.mean().backward()
            tree.add(flat.clone() if len(lanes) > 1 else flat)
            losses.append(loss.detach())
        total = sum_over_processes(tree.sum())
        # The number of lanes is a power of two: this division is exact as well.
        flat.copy_(total / self.recipe.data.lanes)
        return losses

    def _fast_gradients(self, lanes: list[Lane]) -> list[Tensor]:
        self.optimizer.zero_grad()
        losses = []
        for index, lane in enumerate(lanes):
            last = index == len(lanes) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(lane)
                (loss.mean() / len(lanes)).backward()
            losses.append(loss.detach())
        return losses

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimiser's state by parameter name."""
        return {
            f"{name}/{key}": value
            for name, parameter in self.network.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(self, step: int, content: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.step = step
        self.network.load_state_dict(content.model)
        self.ema.network.load_state_dict(content.ema)
        for name, parameter in self.network.named_parameters():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = content.optimizer[f"{name}/{key}"].to(parameter.device)
                # The fused optimiser walks a parameter and its moments together: they share one memory layout.
                state[key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
            self.optimizer.state[parameter] = state
