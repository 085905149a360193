"""Other libraries' training and sampler, as like ours as they come, for `benchmarks.speed`.

They come into var/peers, over the packages that are here.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion.settings import settings

DIFFUSERS = "diffusers==0.42.1"
DENOISING = "denoising-diffusion-pytorch==2.3.4"
BESIDE_IT = ("einops==0.8.2", "ema-pytorch==0.8.3")
NOT_NEEDED = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.utils",
    "pytorch_fid",
    *(f"pytorch_fid.{name}" for name in ("fid_score", "inception")),
)
"""What it imports for its data sets and its FID: no step uses it, and it comes for one release of torch only."""


@dataclass(frozen=True)
class Work:
    """What can be asked to be done once more."""

    once: Callable[[], Any]
    amount: float
    """Of work in it: FLOPs, images or bytes."""


def install() -> None:
    """Have the other libraries importable."""
    folder, wanted = settings().home / "peers", (DIFFUSERS, DENOISING, *BESIDE_IT)
    if not all((folder / f"{one.replace('-', '_').replace('==', '-')}.dist-info").exists() for one in wanted):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*command, "--target", str(folder), *wanted], check=True)
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


@contextlib.contextmanager
def without_needing() -> Iterator[None]:
    """Empty modules in place of those that are not needed, while what imports them is imported."""
    made = {name: types.ModuleType(name) for name in NOT_NEEDED if name not in sys.modules}
    for name, module in made.items():
        module.__dict__.update(transforms=None, utils=None, calculate_frechet_distance=None, InceptionV3=None)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def denoising_step(size: int, batch: int) -> Work:
    """A step with Adam and the library's own average, of a network of the demo's widths and levels."""
    with without_needing():
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # type: ignore[import-not-found]
    from ema_pytorch import EMA  # type: ignore[import-not-found]

    network = Unet(dim=24, dim_mults=(1, 2, 2), attn_dim_head=24)
    diffusion = GaussianDiffusion(network, image_size=size, objective="pred_v")
    optimizer, average = torch.optim.Adam(diffusion.parameters(), 1e-3), EMA(diffusion, update_every=10)
    images = torch.rand(batch, 3, size, size)

    def step() -> None:
        diffusion(images).backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    times = torch.zeros(batch, dtype=torch.long)
    return Work(step, flops_of(lambda: network(images, times).sum().backward()))


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
