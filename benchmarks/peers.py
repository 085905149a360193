"""Another library's training and sampler, as like ours as they come, for `benchmarks.speed`.

It comes into var/peers, over the packages that are here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion.settings import settings

DIFFUSERS = "diffusers==0.42.1"


@dataclass(frozen=True)
class Work:
    """What can be asked to be done once more."""

    once: Callable[[], Any]
    amount: float
    """Of work in it: FLOPs, images or bytes."""


def install() -> None:
    """Have the other library importable."""
    folder = settings().home / "peers"
    if not (folder / f"{DIFFUSERS.replace('==', '-')}.dist-info").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(folder), DIFFUSERS], check=True)
    sys.path.append(str(folder))


def flops_of(passes: Callable[[], Any]) -> float:
    """FLOPs as PyTorch counts them: of the networks alone, attention as the products of matrices that it is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        passes()
    return float(counter.get_total_flops())


def diffusers_network(size: int) -> Any:
    """Of the demo's widths and levels, with attention in the same place."""
    import diffusers  # type: ignore[import-not-found]

    return diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=3,
        attention_head_dim=24,
        num_class_embeds=11,
    )


def diffusers_step(size: int, batch: int) -> Work:
    """A step with AdamW and the library's own average."""
    import diffusers
    from diffusers.training_utils import EMAModel  # type: ignore[import-not-found]

    network = diffusers_network(size)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    optimizer, average = torch.optim.AdamW(network.parameters(), 1e-3), EMAModel(network.parameters())
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))

    def step() -> None:
        noise, times = torch.randn_like(images), torch.randint(0, 1000, (batch,))
        said = network(scheduler.add_noise(images, noise, times), times, class_labels=labels).sample
        torch.nn.functional.mse_loss(said, scheduler.get_velocity(images, noise, times)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    times = torch.zeros(batch, dtype=torch.long)
    return Work(step, flops_of(lambda: network(images, times, class_labels=labels).sample.sum().backward()))


def diffusers_samples(size: int, count: int, steps: int) -> Work:
    """So many samples by its DPM-Solver++ of the second order, as its pipelines draw them."""
    import diffusers

    network = diffusers_network(size).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    labels = torch.arange(count) % 10

    @torch.inference_mode()
    def draw() -> Any:
        scheduler.set_timesteps(steps)
        x = torch.randn(count, 3, size, size)
        for time in scheduler.timesteps:
            x = scheduler.step(network(x, time, class_labels=labels).sample, time, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().byte().numpy()

    return Work(draw, count)
