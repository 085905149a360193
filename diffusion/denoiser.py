"""A network with its process: predicts clean images from noisy ones, and draws samples. Usable from a notebook."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.data.spec import Images, ImageSpec
from diffusion.model.seed_unet import SeedUNet
from diffusion.model.unet import UNet, UNetShape
from diffusion.pixels import Pixels
from diffusion.process import schedule as schedules
from diffusion.process.choices import SamplerName
from diffusion.process.levels import sampling_levels
from diffusion.process.prediction import to_x0
from diffusion.process.reverse import Estimate
from diffusion.process.samplers import SAMPLERS, ddim
from diffusion.process.schedule import Schedule, noise_to_signal, noise_variance
from diffusion.randomness import normals, stream
from diffusion.recipe import Process, Recipe


def make_schedule(process: Process) -> Schedule:
    """The noise schedule of a recipe."""
    if process.schedule == "cosine":
        return schedules.Cosine(process.log_snr_max, process.log_snr_min)
    table = schedules.linear(process.steps) if process.schedule == "linear" else schedules.cosine(process.steps)
    return schedules.zero_terminal_snr(table) if process.zero_terminal_snr else table


def build_network(recipe: Recipe, spec: ImageSpec) -> nn.Module:
    """The untrained network of a recipe for such images. Its initial weights depend on both, and the recipe's seed, alone."""
    size, network, bands = recipe.data.image_size, recipe.network, len(spec.bands)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(recipe.seed, "initial weights").integers(2**63)))
        if network.kind == "seed":
            widths = tuple(network.width * multiplier for multiplier in network.multipliers)
            return SeedUNet(bands, widths, network.blocks)
        return UNet(
            UNetShape(
                image_size=size,
                bands=bands,
                width=network.width,
                multipliers=network.multipliers,
                blocks=network.blocks,
                attention_below=network.attention_below,
                patch=network.patch,
                classes=len(spec.classes) if network.class_conditional else 0,
                dropout=network.dropout,
                outputs=2 * bands if recipe.learned_variance else bands,
                turns=recipe.data.quarter_turns > 0,
            )
        )


def read_output(recipe: Recipe, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """A network's output [batch, bands or twice as many, height, width] as its prediction and, where variances are learned, their mix.

    Both [batch, bands, height, width]; what the mix means: `reverse.Estimate.mix`.
    """
    if not recipe.learned_variance:
        return output, None
    prediction, variance = output.chunk(2, dim=1)
    return prediction, (variance + 1) / 2


@dataclass(frozen=True)
class SamplingPlan:
    """How samples are drawn. What is not given is as the recipe evaluates."""

    steps: int | None = None
    sampler: SamplerName | None = None
    guidance: float | None = None


BY_THE_RECIPE = SamplingPlan()


class Denoiser:
    """Predicts x0 and draws samples.

    Args:
        recipe: the recipe that the network was trained by.
        network: its weights, in evaluation mode.
        pixels: how the training data's levels lie in the space of the process.
    """

    def __init__(self, recipe: Recipe, network: nn.Module, pixels: Pixels) -> None:
        self.recipe, self.network, self.pixels = recipe, network, pixels
        self.schedule = make_schedule(recipe.process)
        self.device = next(network.parameters()).device

    def predict(self, x_t: Tensor, log_snr: Tensor, label: Tensor | None, guidance: float = 1.0) -> Estimate:
        """What the network says about x_t, its x0 in process space and clipped to what pixels can be.

        Args:
            x_t: noisy images [batch, bands, height, width].
            log_snr: [batch] or scalar, float64.
            label: class indices [batch], or None for no class.
            guidance: 1 takes the class as it is; above, samples are pushed towards it (Ho & Salimans 2022,
                arXiv:2207.12598, eq. 6 with w = guidance - 1).
        """
        log_snr = log_snr.to(x_t.device).expand(len(x_t))
        variance = noise_variance(log_snr)
        network_input = x_t.to(torch.float32).contiguous(memory_format=torch.channels_last)
        bf16 = self.recipe.precision == "bf16"
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=bf16):
            output = self.network(network_input, variance, label)
            guided = label is not None and guidance != 1.0
            output_without = self.network(network_input, variance, None) if guided else output
        prediction, mix = read_output(self.recipe, output.float())
        if guided:  # in float32: the difference of two numbers that are nearly alike is stretched
            without, _ = read_output(self.recipe, output_without.float())
            prediction = without + guidance * (prediction - without)
        x0 = to_x0(self.recipe.process.prediction, prediction.to(x_t.dtype), x_t, log_snr)
        low, high = self.pixels.limits(x0)
        return Estimate(torch.clamp(x0, low, high), mix)

    @torch.inference_mode()
    def sample(
        self,
        indices: range,
        labels: NDArray[np.int64] | None,
        seed: int,
        plan: SamplingPlan = BY_THE_RECIPE,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Images:
        """Draw the samples `indices` of `seed`: levels [len(indices), height, width, bands].

        Sample i depends on (seed, i), its label and the plan. The images of one call go through the network together: the same
        calls give the same levels. `watch` may end it early, by raising.
        """

        def noise(k: int) -> Tensor:
            return self.noise(indices, seed, "sample step", k)

        return self.draw(self.start(indices, seed), labels, noise, plan, watch)

    def start(self, indices: Sequence[int], seed: int) -> Tensor:
        """What these samples of `seed` begin as: [len(indices), bands, height, width], of variance one as the data is here."""
        return self.noise(indices, seed, "sample start", 0)

    def noise(self, indices: Sequence[int], seed: int, purpose: str, step: int) -> Tensor:
        """Standard normal images [len(indices), bands, height, width], each of a stream of its own: see `randomness.stream`."""
        shape = (len(self.pixels.spec.bands), self.recipe.data.image_size, self.recipe.data.image_size)
        return torch.from_numpy(normals(seed, purpose, indices, step, shape)).to(self.device)

    @torch.inference_mode()
    def draw(
        self,
        start: Tensor,
        labels: NDArray[np.int64] | None,
        noise: Callable[[int], Tensor],
        plan: SamplingPlan = BY_THE_RECIPE,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Images:
        """Walk from pure noise to images: levels [batch, height, width, bands].

        Args:
            start: standard normal noise [batch, bands, height, width].
            noise: that of step k, like `start`, for the samplers that draw any.
            watch: told (x_t, x0 as predicted from it) at each network evaluation.
        """
        evaluation = self.recipe.evaluation
        name = plan.sampler or evaluation.sampler
        levels = sampling_levels(self.schedule, plan.steps or evaluation.sampler_steps, evaluation.spacing)
        scale = evaluation.guidance if plan.guidance is None else plan.guidance
        low, high = evaluation.guidance_interval or (0.0, math.inf)
        if self.recipe.process.prediction == "epsilon" and torch.isinf(levels[0]):
            raise ValueError("epsilon prediction can't start at pure noise")
        label = None if labels is None else torch.from_numpy(labels).to(self.device)

        def predict(x_t: Tensor, log_snr: Tensor) -> Estimate:
            guided = low < noise_to_signal(log_snr) <= high
            estimate = self.predict(x_t, log_snr, label, scale if guided else 1.0)
            if watch is not None:
                watch(x_t, estimate.x0)
            return estimate

        walk = partial(ddim, eta=evaluation.eta) if name == "ddim" else SAMPLERS[name]
        return self.pixels.decode(walk(predict, start.to(self.device), levels, noise))
