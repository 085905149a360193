"""Bits per dimension: the sampled bound agrees with the exact sum, and its parts with the whole."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.denoiser import Denoiser, build_network
from diffusion.evaluation.likelihood import (
    Draws,
    choose_transitions,
    even_in_log_snr,
    every_transition,
    important,
    measure_bound,
    summarise,
)
from diffusion.evaluation.scores import BOUND_BINS, BoundTerms
from diffusion.jobs.reports import ProgressFile
from diffusion.pixels import Pixels
from diffusion.process.reverse import Estimate
from diffusion.process.schedule import Cosine, chain
from tests.conftest import Ingested, tiny_recipe
from tests.specs import RGB_SPEC


def test_draws_by_importance_are_unbiased_and_vary_less_than_even_ones() -> None:
    levels = chain(Cosine(7.5, -10.0), 200).numpy()
    rng = np.random.default_rng(0)
    step = np.concatenate([[0], levels[:-1] - levels[1:]])
    # Terms as trained networks have them: far from even in log_snr, and another for every image.
    typical = step * np.exp(-0.5 * (levels - 2) ** 2 / 4)
    even = even_in_log_snr(levels)

    def measure(draws: Draws) -> NDArray[np.float64]:
        return typical[draws.positions] * rng.uniform(0.8, 1.2, draws.positions.shape)

    pilot = choose_transitions(even, 1000, 1, "pilot")
    share = important(even, pilot, measure(pilot))
    errors = []
    for shares in (even, share):
        assert shares.sum() == pytest.approx(1)
        draws = choose_transitions(shares, 1000, 8, "test")
        assert draws.positions.min() >= 1
        estimate = summarise(np.concatenate([np.zeros((1000, 2)), measure(draws)], axis=1), draws, levels)
        error = estimate.error * math.log(2)
        assert estimate.total * math.log(2) == pytest.approx(typical.sum(), abs=4 * error)
        errors.append(error)
    assert errors[1] < 0.5 * errors[0]


def test_the_parts_add_up_to_the_whole() -> None:
    levels = chain(Cosine(7.5, -10.0), 50).numpy()
    draws = every_transition(50, 10)
    assert draws.positions.shape == (10, 49)
    nats = np.random.default_rng(0).uniform(0, 1, (10, 51))
    bound = summarise(nats, draws, levels)
    assert len(bound.transitions) == BOUND_BINS
    assert (bound.timestep_edges[0], bound.timestep_edges[-1]) == (50, 1)
    for t, edge in zip(bound.timestep_edges, bound.log_snr_edges, strict=True):
        assert levels[t - 1] >= edge - 1e-9
        assert t == 50 or levels[t] < edge
    assert bound.prior + bound.decoder + sum(bound.transitions) == pytest.approx(bound.total)
    assert bound.total * math.log(2) == pytest.approx(nats.sum(axis=1).mean())
    assert isinstance(draws, Draws)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_network_that_was_told_every_class_is_told_it_here(
    ingested: Ingested, tmp_path: Path, dropout: float
) -> None:
    """Without, it would be asked what it never learnt."""
    told: set[tuple[int, ...] | None] = set()
    recipe = tiny_recipe(network__label_dropout=dropout, evaluation__likelihood_timesteps=2)

    class Listening(Denoiser):
        def predict(self, x_t: Tensor, log_snr: Tensor, label: Tensor | None, guidance: float = 1.0) -> Estimate:
            told.add(None if label is None else tuple(label.tolist()))
            return super().predict(x_t, log_snr, label, guidance)

    denoiser = Listening(recipe, build_network(recipe, RGB_SPEC).eval(), Pixels(ingested.manifest.images))
    images = ShardImages(ingested.store, ingested.manifest, "test", 16, tmp_path)
    measure_bound(denoiser, images, 10, Accelerator(cpu=True), ProgressFile(tmp_path, False))
    labels = np.concatenate([labels for _, labels in images.all()])[:10].tolist()
    batch = recipe.evaluation.batch
    assert told == ({None} if dropout else {tuple(labels[at : at + batch]) for at in range(0, 10, batch)})


@pytest.mark.parametrize("loss", ["simple", "hybrid"])
def test_the_sampled_bound_of_a_network_agrees_with_the_exact_sum(ingested: Ingested, tmp_path, loss: str) -> None:  # type: ignore[no-untyped-def]
    def measure(timesteps: int) -> BoundTerms:
        steps = {"process__steps": 40, "evaluation__likelihood_timesteps": timesteps}
        recipe = tiny_recipe(objective__loss=loss, **steps)
        torch.manual_seed(0)
        network = build_network(recipe, RGB_SPEC).eval()
        for layer in network.modules():  # wake the layers that start at zero
            if isinstance(layer, torch.nn.Conv2d) and layer.weight.abs().max() == 0:
                torch.nn.init.normal_(layer.weight, std=0.05)
        pixels = Pixels(ingested.manifest.images)
        images = ShardImages(ingested.store, ingested.manifest, "test", 16, tmp_path)
        accelerator = Accelerator(cpu=True)
        denoiser, progress = Denoiser(recipe, network, pixels), ProgressFile(tmp_path, False)
        bound, of_each = measure_bound(denoiser, images, 10, accelerator, progress)
        assert len(of_each) == 10
        assert of_each.mean() == pytest.approx(bound.total)
        return bound

    exact, sampled = measure(39), measure(12)
    assert sampled.decoder == pytest.approx(exact.decoder, rel=0.05)
    assert sampled.total == pytest.approx(exact.total, abs=4 * math.hypot(exact.error, sampled.error))
    assert 0 < exact.prior < 0.01
