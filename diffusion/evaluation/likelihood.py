"""Bits per dimension of held-out images: the variational bound, estimated from a stratified choice of timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from diffusion.data.loader import ShardImages
from diffusion.denoiser import Denoiser
from diffusion.evaluation.sharding import block_sizes, gather_rows
from diffusion.job import ProgressFile
from diffusion.process.bound import decoder_term, prior_term, transition_term
from diffusion.process.levels import stratified_uniforms
from diffusion.process.schedule import chain
from diffusion.randomness import stream

TIMESTEPS_PER_IMAGE = 8
SEED = 0  # of the noise that the bound is measured with: the same for every model, so that they compare


@dataclass(frozen=True)
class Bound:
    """The bound over a set of images, in bits a subpixel."""

    bits: float
    error: float
    """Standard error over the images and timesteps."""
    images: int


@torch.inference_mode()
def bits_per_dim(
    denoiser: Denoiser, test: ShardImages, images: int, accelerator: Accelerator, progress: ProgressFile
) -> Bound:
    """The bound of the first `images` images: decoder and prior for each, the T - 1 transitions by importance sampling.

    A transition is drawn in proportion to its step in log_snr: at high SNR the error of x0 falls as 1 / SNR, so that a
    term is about half of that step, and the draws weigh nearly alike.
    """
    steps = denoiser.recipe.process.steps
    log_snr = chain(denoiser.schedule, steps).to(accelerator.device)
    share = (log_snr[:-1] - log_snr[1:]).cpu().numpy()
    share = share / share.sum()
    cumulative = np.cumsum(share)
    size = denoiser.recipe.data.image_size
    pixels = np.concatenate([shard for shard, _ in test.all()])[:images]
    sizes = block_sizes(len(pixels), denoiser.recipe.evaluation.batch)

    def denoise(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return denoiser.predict_x0(x, level, None)

    blocks = {}
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    for done, block in enumerate(mine, start=1):
        start = block * denoiser.recipe.evaluation.batch
        count = sizes[block]
        x0 = denoiser.pixels.encode(pixels[start : start + count], torch.float64).to(accelerator.device)
        bins = denoiser.pixels.bins(x0)
        total = prior_term(x0, log_snr[-1].expand(count))
        for draw in range(1 + TIMESTEPS_PER_IMAGE):
            noise = [
                stream(SEED, "bound noise", start + image, draw).standard_normal((3, size, size))
                for image in range(count)
            ]
            epsilon = torch.from_numpy(np.stack(noise)).to(x0)
            if draw == 0:
                total = total + decoder_term(denoise, x0, epsilon, log_snr[0].expand(count), bins)
            else:
                # Positions 1..T-1 of the chain, t = 2..T, one draw in each of `count` equal stretches of log_snr.
                uniforms = stratified_uniforms(stream(SEED, "bound timesteps", block, draw), count)
                chosen = np.minimum(np.searchsorted(cumulative, uniforms, side="right"), steps - 2)
                position = torch.from_numpy(chosen + 1).to(x0.device)
                term = transition_term(denoise, x0, epsilon, log_snr[position], log_snr[position - 1])
                total = total + term / torch.from_numpy(share[chosen]).to(x0.device) / TIMESTEPS_PER_IMAGE
        blocks[block] = total
        progress.write("likelihood", done, len(mine))
    nats = gather_rows(accelerator, blocks, sizes, torch.zeros((), dtype=torch.float64))
    return Bound(
        bits=float(nats.mean() / math.log(2)),
        error=float(nats.std(ddof=1) / math.sqrt(len(nats)) / math.log(2)) if len(nats) > 1 else math.inf,
        images=len(nats),
    )
