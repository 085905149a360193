"""The trainer: everything that changes while training, and how one step changes it."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sysconfig
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.data.manifest import Manifest
from diffusion.denoiser import build_network, read_output
from diffusion.features.extractor import load_teacher
from diffusion.features.identity import identify
from diffusion.model.ema import EMA
from diffusion.model.placement import place
from diffusion.model.unet import UNet
from diffusion.pixels import Pixels
from diffusion.process.bound import chain_term
from diffusion.process.objective import Losses, simple_loss, weight, with_bound
from diffusion.process.prediction import diffuse, target, to_x0
from diffusion.process.reverse import Estimate
from diffusion.process.schedule import noise_variance
from diffusion.recipe import Recipe
from diffusion.store.objects import Store
from diffusion.training.alignment import Aligned
from diffusion.training.batches import Lane
from diffusion.training.checkpoint import Checkpoint
from diffusion.training.noise_levels import DrawnLevels, LevelSource
from diffusion.training.optimizer import make_optimizers
from diffusion.training.reduction import GradientBuffer, Tree, sum_over_processes
from diffusion.training.state import average_name

log = logging.getLogger(__name__)

NOISE_LEVELS = "noise levels"
"""Of the checkpoint's optimiser tensors, those that no parameter owns."""
ALIGNMENT = "alignment"
"""And those of the head that only training has."""


def lanes_of_process(recipe: Recipe, rank: int, processes: int) -> range:
    """The lanes that fall to one process: whole neighbouring subtrees of the tree. Raises RecipeError if they can't."""
    recipe.check_processes(processes)
    share = recipe.data.lanes // processes
    return range(rank * share, (rank + 1) * share)


def learning_rate(recipe: Recipe, images_seen: int) -> float:
    """The rate at a point of the budget: a function of images, not of steps or processes.

    A recipe that goes on from a checkpoint decays anew, over its own images.
    """
    optimizer, before = recipe.optimizer, recipe.first_step * recipe.data.batch_size
    share = (images_seen - before) / (recipe.data.images - before)
    rate = optimizer.learning_rate
    if optimizer.decay == "cosine":
        rate *= 0.5 * (1 + np.cos(np.pi * min(1.0, share)))
    if images_seen < optimizer.warmup_images:
        rate *= images_seen / optimizer.warmup_images
    return float(rate)


def _can_compile(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    missing = [
        name
        for name, there in (
            ("a C compiler", any(map(shutil.which, ("cc", "gcc", "clang")))),
            ("Python's headers (the package python3-dev)", headers),
            ("the package triton", find_spec("triton") is not None),
        )
        if not there
    ]
    if missing:
        log.warning("torch.compile lacks %s: training runs uncompiled, and slower.", " and ".join(missing))
    return not missing


@dataclass(frozen=True)
class StepReport:
    """What a step has to say. Lanes are those of this process."""

    losses: list[Tensor]
    """Of each lane: [micro-batch]."""
    log_snr: list[Tensor]
    """Their noise levels."""
    gradient_norm: Tensor
    """Before clipping."""
    learning_rate: float


class Trainer:
    """Everything that changes while training, and how one step changes it."""

    def __init__(self, recipe: Recipe, dataset: Manifest, accelerator: Accelerator, store: Store) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.lanes = lanes_of_process(recipe, accelerator.process_index, accelerator.num_processes)
        device = accelerator.device
        self.network = place(build_network(recipe, dataset.images), device)
        self.aligned = None
        if recipe.aligned_with is not None:
            assert isinstance(self.network, UNet)
            teacher = load_teacher(identify(recipe.aligned_with, store, dataset, None), store, dataset, device)
            self.aligned = place(Aligned(self.network, teacher, recipe.seed), device)
        self.trained: nn.Module = self.aligned or self.network
        self.averages = {average_name(half): EMA(self.network, half, recipe.ema.ramp) for half in recipe.ema.half_lives}
        self.levels = LevelSource(recipe)
        self.chain = self.levels.chain.to(device)
        self.bins = Pixels(dataset.images).bins(self.chain) if recipe.learned_variance else None
        self.optimizers = make_optimizers(recipe, self._parameters)
        self.step = 0
        fast = recipe.reduction == "fast"
        # DistributedDataParallel is compiled with what it wraps: only so does it send while the backward pass runs.
        self.wrapped: nn.Module = accelerator.prepare_model(self.trained) if fast else self.trained
        self.forward = torch.compile(self.wrapped) if _can_compile(device) else self.wrapped
        self.gradients = None if fast else GradientBuffer(self.trained)

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """By name, those of the network as they are called in it."""
        return {name.removeprefix("network."): parameter for name, parameter in self.trained.named_parameters()}

    @property
    def images_seen(self) -> int:
        """Images behind the weights."""
        return self.step * self.recipe.data.batch_size

    def train_step(self, lanes: list[Lane]) -> StepReport:
        """One optimiser step."""
        recipe = self.recipe
        self.trained.train()
        levels = [self.levels.draw(lane.uniform) for lane in lanes]
        losses = (self._exact_gradients if self.gradients else self._fast_gradients)(lanes, levels)
        if self.levels.learns:
            self._observe(levels, losses)
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), recipe.optimizer.clip_norm)
        rate = learning_rate(recipe, self.images_seen + recipe.data.batch_size)
        for optimizer in self.optimizers:
            optimizer.step(rate)
        self.step += 1
        for average in self.averages.values():
            average.update(self.network, self.images_seen, recipe.data.batch_size)
        return StepReport(losses, [level.log_snr for level in levels], norm, rate)

    def _loss(self, lane: Lane, levels: DrawnLevels) -> Losses:
        recipe, objective = self.recipe, self.recipe.objective
        x_t = diffuse(lane.x0, lane.epsilon, levels.log_snr).contiguous(memory_format=torch.channels_last)
        if recipe.network.dropout:
            torch.manual_seed(lane.dropout_seed)  # dropout takes its numbers from the global generator only
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            output = self.forward(x_t, noise_variance(levels.log_snr), lane.label, lane.turn)
        if self.aligned is None:
            return self._losses_of(output, lane, x_t, levels)
        output, foretold = output
        losses = self._losses_of(output, lane, x_t, levels)
        misalignment = self.aligned.misalignment(foretold, lane.x0)
        if self.levels.learns and levels.share is not None:  # as the loss itself
            misalignment = misalignment / (self.levels.steps * levels.share)
        return replace(losses, weighted=losses.weighted + objective.alignment * misalignment)

    def _losses_of(self, output: Tensor, lane: Lane, x_t: Tensor, levels: DrawnLevels) -> Losses:
        recipe, objective = self.recipe, self.recipe.objective
        prediction, mix = read_output(recipe, output)
        kind, weighting = recipe.process.prediction, objective.weighting
        aim = target(kind, lane.x0, lane.epsilon, levels.log_snr)
        simple = simple_loss(prediction, aim, weight(weighting, kind, levels.log_snr, objective.gamma), objective.error)
        if levels.position is None or levels.share is None:
            return Losses(simple, simple)
        bound = torch.zeros_like(levels.share)
        if self.bins is not None:
            estimate = Estimate(to_x0(kind, prediction.double(), x_t.double(), levels.log_snr), mix)
            taught = estimate.detached_mean() if objective.loss == "hybrid" else estimate
            bound = chain_term(taught, lane.x0, x_t, levels.position, self.chain, self.bins)
        return with_bound(
            objective.loss,
            simple,
            self.levels.steps * bound,
            self.levels.steps * levels.share,
            objective.bound_weight,
            unweight_simple=self.levels.learns,
        )

    def _observe(self, levels: list[DrawnLevels], losses: list[Tensor]) -> None:
        """Have the noise levels learn from the losses of all lanes: in lane order, the same on every process."""
        positions = torch.stack([level.position for level in levels if level.position is not None])
        positions, gathered = self.accelerator.gather((positions, torch.stack(losses)))
        self.levels.observe(positions.flatten(), gathered.flatten())

    def _exact_gradients(self, lanes: list[Lane], levels: list[DrawnLevels]) -> list[Tensor]:
        assert self.gradients is not None
        flat, tree, losses = self.gradients.flat, Tree(), []
        for lane, level in zip(lanes, levels, strict=True):
            flat.zero_()
            loss = self._loss(lane, level)
            loss.weighted.mean().backward()
            tree.add(flat.clone() if len(lanes) > 1 else flat)
            losses.append(loss.own.detach())
        total = sum_over_processes(tree.sum())
        # The number of lanes is a power of two: this division is exact as well.
        flat.copy_(total / self.recipe.data.lanes)
        return losses

    def _fast_gradients(self, lanes: list[Lane], levels: list[DrawnLevels]) -> list[Tensor]:
        self.trained.zero_grad()
        losses = []
        for index, (lane, level) in enumerate(zip(lanes, levels, strict=True)):
            last = index == len(lanes) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(lane, level)
                (loss.weighted.mean() / len(lanes)).backward()
            losses.append(loss.own.detach())
        return losses

    def state_tensors(self) -> dict[str, Tensor]:
        """What a step needs beside the weights: the optimisers' state, what the noise levels remember, the alignment's head."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self._parameters.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
        }
        others = {NOISE_LEVELS: self.levels.state, ALIGNMENT: self.aligned.state if self.aligned else {}}
        return moments | {f"{name}/{key}": value for name, state in others.items() for key, value in state.items()}

    def restore(self, step: int, content: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.step = step
        self.network.load_state_dict(content.model)
        for name, average in self.averages.items():
            average.network.load_state_dict(content.averages[name])
        self.levels.restore({key: content.optimizer[f"{NOISE_LEVELS}/{key}"] for key in self.levels.state})
        if self.aligned is not None:
            self.aligned.restore({key: content.optimizer[f"{ALIGNMENT}/{key}"] for key in self.aligned.state})
        parameters = self._parameters
        remembered = {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        for entry, value in content.optimizer.items():
            name, _, key = entry.partition("/")
            if name in (NOISE_LEVELS, ALIGNMENT):
                continue
            parameter = parameters[name]
            # The fused optimiser walks a parameter and its moments together: they share one memory layout.
            like = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
            remembered[parameter][key] = like.to(parameter.device)
