"""Bits per dimension of held-out images: the variational bound, estimated from a stratified choice of timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.denoiser import Denoiser
from diffusion.evaluation.scores import BOUND_BINS, BoundTerms
from diffusion.evaluation.sharding import block_sizes, gather_rows
from diffusion.job import ProgressFile
from diffusion.process.bound import decoder_term, prior_term, transition_term
from diffusion.process.levels import stratified_uniforms
from diffusion.process.schedule import chain
from diffusion.randomness import stream

SEED = 0
LOWEST_LOG_SNR = -20.0  # what a last step of pure noise counts as where finite numbers are needed


@dataclass(frozen=True)
class Draws:
    """Which transitions are measured for an image, and how likely each was to be drawn."""

    positions: NDArray[np.int64]
    """Positions 1..T-1 of the chain, t = 2..T: [images, draws]."""
    share: NDArray[np.float64]
    """Probability of each position, [T], zero at the first."""


@torch.inference_mode()
def bits_per_dim(
    denoiser: Denoiser, test: ShardImages, images: int, accelerator: Accelerator, progress: ProgressFile
) -> BoundTerms:
    """The bound of the first `images` images: decoder and prior for each, the T - 1 transitions by importance sampling.

    A transition is drawn in proportion to its step in log_snr: at high SNR the error of x0 falls as 1 / SNR, so that a
    term is about half of that step, and the draws weigh nearly alike. With `evaluation.likelihood_timesteps` of T - 1 or
    more, every transition is measured: the exact sum.
    """
    recipe = denoiser.recipe
    log_snr = chain(denoiser.schedule, recipe.process.steps).to(accelerator.device)
    pixels = np.concatenate([shard for shard, _ in test.all()])[:images]
    sizes = block_sizes(len(pixels), recipe.evaluation.batch)
    draws = choose_transitions(log_snr.cpu().numpy(), len(pixels), recipe.evaluation.likelihood_timesteps)
    count = draws.positions.shape[1]

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        return denoiser.predict_x0(x, level, None)

    blocks = {}
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    for done, block in enumerate(mine, start=1):
        rows = range(block * recipe.evaluation.batch, block * recipe.evaluation.batch + sizes[block])
        x0 = denoiser.pixels.encode(pixels[rows.start : rows.stop], torch.float64).to(accelerator.device)
        first, last = log_snr[0].expand(len(rows)), log_snr[-1].expand(len(rows))
        columns = [
            prior_term(x0, last),
            decoder_term(denoise, x0, _noise(rows, count, x0), first, denoiser.pixels.bins(x0)),
        ]
        for draw in range(count):
            position = torch.from_numpy(draws.positions[rows.start : rows.stop, draw]).to(x0.device)
            noise = _noise(rows, draw, x0)
            columns.append(transition_term(denoise, x0, noise, log_snr[position], log_snr[position - 1]))
        blocks[block] = torch.stack(columns, dim=1)
        progress.write("likelihood", done, len(mine))
    nats = gather_rows(accelerator, blocks, sizes, torch.zeros(2 + count, dtype=torch.float64))
    return summarise(nats, draws, log_snr.cpu().numpy())


def choose_transitions(log_snr: NDArray[np.float64], images: int, count: int) -> Draws:
    """`count` transitions for each image, stratified over the images; or all of them, if there are no more."""
    steps = len(log_snr)
    finite = np.maximum(log_snr, LOWEST_LOG_SNR)
    share = np.concatenate([[0.0], finite[:-1] - finite[1:]])
    if count >= steps - 1:
        every = np.tile(np.arange(1, steps), (images, 1))
        return Draws(every, np.full(steps, 1 / (steps - 1)))
    share = share / share.sum()
    columns = []
    for draw in range(count):
        uniforms = stratified_uniforms(stream(SEED, "bound timesteps", draw), images)
        columns.append(np.clip(np.searchsorted(np.cumsum(share), uniforms, side="right"), 1, steps - 1))
    return Draws(np.stack(columns, axis=1), share)


def summarise(nats: NDArray[np.float64], draws: Draws, log_snr: NDArray[np.float64]) -> BoundTerms:
    """Means over the images of the parts of the bound, in bits a subpixel. nats: prior, decoder, then the draws."""
    bits = nats / math.log(2)
    weighted = bits[:, 2:] / draws.share[draws.positions] / draws.positions.shape[1]
    total = bits[:, :2].sum(axis=1) + weighted.sum(axis=1)
    edges = np.linspace(max(log_snr[-1], LOWEST_LOG_SNR), log_snr[0], BOUND_BINS + 1)
    bin_of = np.clip(np.digitize(log_snr[draws.positions], edges) - 1, 0, BOUND_BINS - 1)
    by_bin = np.bincount(bin_of.ravel(), weighted.ravel(), BOUND_BINS) / len(nats)
    return BoundTerms(
        total=float(total.mean()),
        error=float(total.std(ddof=1) / math.sqrt(len(total))) if len(total) > 1 else math.inf,
        images=len(total),
        prior=float(bits[:, 0].mean()),
        decoder=float(bits[:, 1].mean()),
        transitions=tuple(by_bin.tolist()),
        log_snr_edges=tuple(edges.tolist()),
    )


def _noise(rows: range, draw: int, like: Tensor) -> Tensor:
    """Noise of one draw for the images `rows`: the same for every model, so that they compare."""
    draws = [stream(SEED, "bound noise", row, draw).standard_normal(like.shape[1:]) for row in rows]
    return torch.from_numpy(np.stack(draws)).to(like)
