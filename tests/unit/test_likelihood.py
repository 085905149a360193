"""Bits per dimension: the sampled bound agrees with the exact sum, and its parts with the whole."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from diffusion.data.loader import ShardImages
from diffusion.denoiser import Denoiser, Pixels, build_network
from diffusion.evaluation.likelihood import Draws, bits_per_dim, choose_transitions, summarise
from diffusion.evaluation.scores import BOUND_BINS, BoundTerms
from diffusion.job import ProgressFile
from diffusion.process.schedule import Cosine, chain
from tests.conftest import Ingested, tiny_recipe


def test_importance_weights_make_the_estimate_unbiased() -> None:
    levels = chain(Cosine(7.5, -10.0), 200).numpy()
    rng = np.random.default_rng(0)
    terms = rng.uniform(0.5, 1.5, 200) * np.concatenate([[0], levels[:-1] - levels[1:]])
    draws = choose_transitions(levels, 2000, 8)
    assert draws.positions.min() >= 1
    assert draws.share.sum() == pytest.approx(1)
    nats = np.concatenate([np.zeros((2000, 2)), terms[draws.positions]], axis=1)
    estimate = summarise(nats, draws, levels)
    assert estimate.total * math.log(2) == pytest.approx(terms.sum(), abs=4 * estimate.error * math.log(2))
    assert estimate.error * math.log(2) < 0.01 * terms.sum()


def test_the_parts_add_up_to_the_whole() -> None:
    levels = chain(Cosine(7.5, -10.0), 50).numpy()
    draws = choose_transitions(levels, 10, 100)
    assert draws.positions.shape == (10, 49), "asked for more than there are, it takes all"
    nats = np.random.default_rng(0).uniform(0, 1, (10, 51))
    bound = summarise(nats, draws, levels)
    assert len(bound.transitions) == BOUND_BINS
    assert bound.prior + bound.decoder + sum(bound.transitions) == pytest.approx(bound.total)
    assert bound.total * math.log(2) == pytest.approx(nats.sum(axis=1).mean())
    assert isinstance(draws, Draws)


def test_the_sampled_bound_of_a_network_agrees_with_the_exact_sum(ingested: Ingested, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def measure(timesteps: int) -> BoundTerms:
        recipe = tiny_recipe(process__steps=40, evaluation__likelihood_timesteps=timesteps)
        torch.manual_seed(0)
        network = build_network(recipe, 10).eval()
        pixels = Pixels(ingested.manifest.pixel_mean, ingested.manifest.pixel_std)
        images = ShardImages(ingested.store, ingested.manifest, "test", 16, tmp_path)
        accelerator = Accelerator(cpu=True)
        return bits_per_dim(Denoiser(recipe, network, pixels), images, 10, accelerator, ProgressFile(tmp_path, False))

    exact, sampled = measure(39), measure(12)
    assert sampled.decoder == pytest.approx(exact.decoder, rel=0.05)
    assert sampled.total == pytest.approx(exact.total, abs=4 * math.hypot(exact.error, sampled.error))
    assert 0 < exact.prior < 0.01
