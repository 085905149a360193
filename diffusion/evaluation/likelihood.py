"""Bits per dimension of held-out images: the variational bound, exact or from a choice of timesteps by importance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.spec import Images, Labels
from diffusion.denoiser import Denoiser
from diffusion.evaluation.scores import BOUND_BINS, BoundTerms
from diffusion.evaluation.sharding import block_sizes, share_out
from diffusion.jobs.reports import ProgressFile
from diffusion.process.bound import decoder_term, prior_term, transition_term
from diffusion.process.levels import stratified_uniforms
from diffusion.process.prediction import diffuse
from diffusion.process.reverse import Estimate
from diffusion.process.schedule import chain
from diffusion.randomness import normals, stream

SEED = 0
PILOT_BINS = 25  # of the chain, in which the transitions count as alike when their importance is found out
PILOT_SHARE = 0.1  # of the draws, that is left evenly spread in log_snr: no weight is more than ten times the even one
LOWEST_LOG_SNR = -20.0  # what a last step of pure noise counts as where finite numbers are needed


@dataclass(frozen=True)
class Draws:
    """Which transitions are measured for an image, and how likely each was to be drawn."""

    positions: NDArray[np.int64]
    """Positions 1..T-1 of the chain, t = 2..T: [images, draws]."""
    share: NDArray[np.float64]
    """Probability of each position, [T], zero at the first."""


@torch.inference_mode()
def measure_bound(
    denoiser: Denoiser, test: ShardImages, images: int, accelerator: Accelerator, progress: ProgressFile
) -> tuple[BoundTerms, NDArray[np.float64]]:
    """The bound of the first `images` images, and that of each in bits a subpixel, [images].

    Decoder and prior are measured for each, the T - 1 transitions by importance sampling.

    A transition is drawn in proportion to the root of its second moment (Nichol & Dhariwal 2021, eq. 18), which a pilot of
    one draw an image finds out. The pilot draws in proportion to the step in log_snr: at high SNR the error of x0 falls as
    1 / SNR, so that a term is about half of that step. With `evaluation.likelihood_timesteps` of T - 1 or more, every
    transition is measured: the exact sum.
    """
    recipe = denoiser.recipe
    log_snr = chain(denoiser.schedule, recipe.process.steps)
    pixels, labels = test.first(images)
    count = recipe.evaluation.likelihood_timesteps
    given = labels if recipe.needs_class else None
    measure = Measurement(denoiser, pixels, given, log_snr.to(accelerator.device), accelerator, progress)
    ends = measure.ends()
    if count >= len(log_snr) - 1:
        draws = every_transition(len(log_snr), len(pixels))
    else:
        even = even_in_log_snr(log_snr.numpy())
        pilot = choose_transitions(even, len(pixels), 1, "bound pilot")
        terms = measure.transitions(pilot, "bound pilot noise")
        draws = choose_transitions(important(even, pilot, terms), len(pixels), count, "bound timesteps")
    nats = np.concatenate([ends, measure.transitions(draws, "bound noise")], axis=1)
    return summarise(nats, draws, log_snr.numpy()), of_each_image(nats, draws)


@dataclass(frozen=True)
class Measurement:
    """Measures terms of the bound of some images; the work is shared out in blocks of images."""

    denoiser: Denoiser
    pixels: Images
    labels: Labels | None
    """Their classes, where the network says nothing without: the bound is then of images given their class."""
    log_snr: Tensor
    """Of the chain, [T], on the device."""
    accelerator: Accelerator
    progress: ProgressFile

    def ends(self) -> NDArray[np.float64]:
        """Prior and decoder term of each image: nats a dimension, [images, 2]."""

        def of(rows: range, x0: Tensor) -> list[Tensor]:
            first, second, last = (self.log_snr[at].expand(len(rows)) for at in (0, 1, -1))
            estimate = self._estimate(rows, diffuse(x0, _noise(rows, 0, x0, "bound decoder noise"), first), first)
            bins = self.denoiser.pixels.bins(x0)
            return [prior_term(x0, last), decoder_term(estimate, x0, first, second, bins)]

        return self._blockwise(2, of)

    def transitions(self, draws: Draws, purpose: str) -> NDArray[np.float64]:
        """The drawn terms: nats a dimension, [images, draws]."""

        def of(rows: range, x0: Tensor) -> list[Tensor]:
            terms = []
            for draw in range(draws.positions.shape[1]):
                position = torch.from_numpy(draws.positions[rows.start : rows.stop, draw]).to(x0.device)
                now, before = self.log_snr[position], self.log_snr[position - 1]
                x_t = diffuse(x0, _noise(rows, draw, x0, purpose), now)
                terms.append(transition_term(self._estimate(rows, x_t, now), x0, x_t, now, before))
            return terms

        return self._blockwise(draws.positions.shape[1], of)

    def _estimate(self, rows: range, x_t: Tensor, log_snr: Tensor) -> Estimate:
        if self.labels is None:
            return self.denoiser.predict(x_t, log_snr, None)
        return self.denoiser.predict(x_t, log_snr, torch.from_numpy(self.labels[rows.start : rows.stop]).to(x_t.device))

    def _blockwise(self, columns: int, of: Callable[[range, Tensor], list[Tensor]]) -> NDArray[np.float64]:
        def terms(_: int, rows: range) -> Tensor:
            pixels = self.pixels[rows.start : rows.stop]
            x0 = self.denoiser.pixels.encode(pixels, torch.float64).to(self.accelerator.device)
            return torch.stack(of(rows, x0), dim=1)

        sizes = block_sizes(len(self.pixels), self.denoiser.recipe.evaluation.batch)
        like = torch.zeros(columns, dtype=torch.float64)
        return share_out(self.accelerator, sizes, terms, like, partial(self.progress.write, "likelihood"))


def even_in_log_snr(log_snr: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of the chain's positions in proportion to their step in log_snr, [T], zero at the first."""
    finite = np.maximum(log_snr, LOWEST_LOG_SNR)
    share = np.concatenate([[0.0], finite[:-1] - finite[1:]])
    return share / share.sum()


def important(even: NDArray[np.float64], pilot: Draws, terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of the chain's positions in proportion to the root of their terms' second moments, [T].

    Within a bin of equally many `even` draws, terms count as proportional to their even probability.
    """
    bin_of = np.clip((np.cumsum(even) * PILOT_BINS).astype(int), 0, PILOT_BINS - 1)
    drawn = bin_of[pilot.positions].ravel()
    squares = np.bincount(drawn, np.square(terms / even[pilot.positions]).ravel(), PILOT_BINS)
    count = np.bincount(drawn, minlength=PILOT_BINS)
    overall = squares.sum() / count.sum()
    # A bin without draws counts as the mean of all.
    root = np.sqrt(np.where(count > 0, squares / np.maximum(count, 1), overall))
    share = even * root[bin_of]
    return (1 - PILOT_SHARE) * share / share.sum() + PILOT_SHARE * even


def every_transition(steps: int, images: int) -> Draws:
    """All transitions of a chain for each image."""
    return Draws(np.tile(np.arange(1, steps), (images, 1)), np.full(steps, 1 / (steps - 1)))


def choose_transitions(share: NDArray[np.float64], images: int, count: int, purpose: str) -> Draws:
    """`count` transitions for each image by their probabilities `share`, stratified over the images."""
    columns = []
    for draw in range(count):
        uniforms = stratified_uniforms(stream(SEED, purpose, draw), images)
        columns.append(np.clip(np.searchsorted(np.cumsum(share), uniforms, side="right"), 1, len(share) - 1))
    return Draws(np.stack(columns, axis=1), share)


def of_each_image(nats: NDArray[np.float64], draws: Draws) -> NDArray[np.float64]:
    """The bound of each image in bits a subpixel, [images]. nats: prior, decoder, then the draws."""
    total: NDArray[np.float64] = (nats[:, :2].sum(axis=1) + _weighted(nats, draws).sum(axis=1)) / math.log(2)
    return total


def _weighted(nats: NDArray[np.float64], draws: Draws) -> NDArray[np.float64]:
    """What each draw adds to the bound of its image."""
    weighted: NDArray[np.float64] = nats[:, 2:] / draws.share[draws.positions] / draws.positions.shape[1]
    return weighted


def summarise(nats: NDArray[np.float64], draws: Draws, log_snr: NDArray[np.float64]) -> BoundTerms:
    """Means over the images of the parts of the bound, in bits a subpixel. nats: prior, decoder, then the draws."""
    ends, weighted = nats[:, :2] / math.log(2), _weighted(nats, draws) / math.log(2)
    total = of_each_image(nats, draws)
    edges = np.linspace(max(log_snr[-1], LOWEST_LOG_SNR), log_snr[0], BOUND_BINS + 1)
    bin_of = np.clip(np.digitize(log_snr[draws.positions], edges) - 1, 0, BOUND_BINS - 1)
    by_bin = np.bincount(bin_of.ravel(), weighted.ravel(), BOUND_BINS) / len(nats)
    return BoundTerms(
        total=float(total.mean()),
        error=float(total.std(ddof=1) / math.sqrt(len(total))) if len(total) > 1 else math.inf,
        images=len(total),
        prior=float(ends[:, 0].mean()),
        decoder=float(ends[:, 1].mean()),
        transitions=tuple(by_bin.tolist()),
        log_snr_edges=tuple(edges.tolist()),
        timestep_edges=tuple(np.searchsorted(-log_snr, -edges, side="right").tolist()),
    )


def _noise(rows: range, draw: int, like: Tensor, purpose: str) -> Tensor:
    """Noise of one draw for the images `rows`: the same for every model, so that they compare."""
    return torch.from_numpy(normals(SEED, purpose, rows, draw, like.shape[1:], np.float64)).to(like)
