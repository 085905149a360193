"""How training draws noise levels, and that what it lowers means the same however they are drawn."""

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.process.levels import cells_of_log_normal, stratified_uniforms
from diffusion.process.objective import with_bound
from diffusion.process.schedule import Cosine, chain
from diffusion.randomness import stream
from diffusion.training.batches import quarter_turns
from diffusion.training.noise_levels import LevelSource
from tests.conftest import tiny_recipe


def uniforms(step: int, count: int = 64) -> Tensor:
    return torch.from_numpy(stratified_uniforms(stream(0, "level", step), count))


def loss_at(position: Tensor) -> Tensor:
    """A loss that is a hundred times larger at the first tenth of the chain."""
    return torch.where(position < 20, 10.0, 0.1).double()


def trained_source() -> LevelSource:
    source = LevelSource(tiny_recipe(objective__noise_levels="importance", process__steps=200))
    for step in range(200):
        levels = source.draw(uniforms(step))
        assert levels.position is not None
        source.observe(levels.position, loss_at(levels.position))
    return source


def test_importance_is_uniform_until_every_group_was_seen_and_then_follows_the_losses() -> None:
    source = LevelSource(tiny_recipe(objective__noise_levels="importance", process__steps=200))
    torch.testing.assert_close(source.shares(), torch.full((200,), 1 / 200, dtype=torch.float64))
    positions = torch.arange(100)  # of half the groups, often
    for _ in range(20):
        source.observe(positions, loss_at(positions))
    torch.testing.assert_close(source.shares(), torch.full((200,), 1 / 200, dtype=torch.float64))
    shares = trained_source().shares()
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[:20].sum()) == pytest.approx(20 * 10 / (20 * 10 + 180 * 0.1), abs=0.01)
    assert shares.min() > 0


def test_losses_drawn_by_importance_are_unbiased_and_vary_less() -> None:
    source = trained_source()
    expected = float(loss_at(torch.arange(200)).mean())
    by_importance, evenly = [], []
    for step in range(1000, 1200):
        levels = source.draw(uniforms(step, 16))
        assert levels.position is not None
        assert levels.share is not None
        own = loss_at(levels.position)
        losses = with_bound("simple", own, torch.zeros_like(own), 200 * levels.share, 0.0, unweight_simple=True)
        assert torch.equal(losses.own, own)
        by_importance.append(float(losses.weighted.mean()))
        evenly.append(float(loss_at((uniforms(step, 16) * 200).long()).mean()))
    assert np.mean(by_importance) == pytest.approx(expected, rel=0.02)
    assert np.std(by_importance) < 0.2 * np.std(evenly)


def test_the_importance_goes_on_from_a_checkpoint() -> None:
    first = trained_source()
    second = LevelSource(tiny_recipe(objective__noise_levels="importance", process__steps=200))
    second.restore({name: value.clone() for name, value in first.state.items()})
    for step in range(3):
        ours, theirs = first.draw(uniforms(step)), second.draw(uniforms(step))
        assert torch.equal(ours.log_snr, theirs.log_snr)
        for source, levels in ((first, ours), (second, theirs)):
            assert levels.position is not None
            source.observe(levels.position, levels.log_snr.abs())
    assert torch.equal(first.second_moment, second.second_moment)


def test_steps_of_a_chain_drawn_log_normally_have_the_normal_s_moments() -> None:
    levels = chain(Cosine(12.0, -12.0), 4000)
    cells = cells_of_log_normal(levels, 1.0, 2.0)
    assert float(cells.sum()) == pytest.approx(1, abs=1e-12)
    assert (cells >= 0).all()
    mean = float((cells * levels).sum())
    assert mean == pytest.approx(1.0, abs=0.01)
    assert float((cells * (levels - mean) ** 2).sum()) == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("noise_levels", ["uniform", "log_normal", "importance"])
def test_the_bound_means_the_same_however_steps_are_drawn(noise_levels: str) -> None:
    recipe = tiny_recipe(objective__loss="vlb", objective__noise_levels=noise_levels, process__steps=100)
    source = LevelSource(recipe)
    terms = torch.linspace(0.001, 0.1, 100, dtype=torch.float64)
    estimates = []
    for step in range(400):
        levels = source.draw(uniforms(step))
        assert levels.position is not None
        assert levels.share is not None
        bound = terms[levels.position]
        losses = with_bound("vlb", torch.zeros_like(bound), 100 * bound, 100 * levels.share, 1e-3, source.learns)
        if source.learns:
            source.observe(levels.position, losses.own)
        estimates.append(float(losses.weighted.mean()))
    spread = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(float(terms.sum()), abs=4 * spread + 1e-9)


def test_hybrid_is_the_simple_loss_and_a_little_of_the_whole_bound() -> None:
    simple, bound, share = (torch.tensor([value], dtype=torch.float64) for value in (0.5, 0.02, 0.001))
    losses = with_bound("hybrid", simple, 1000 * bound, 1000 * share, 1e-3, unweight_simple=False)
    assert float(losses.weighted) == pytest.approx(0.5 + 1e-3 * 1000 * 0.02)
    rare = with_bound("hybrid", simple, 1000 * bound, 250 * share, 1e-3, unweight_simple=False)
    assert float(rare.weighted) == pytest.approx(0.5 + 4 * 1e-3 * 1000 * 0.02), "the bound is weighted, simple is not"
    assert float(rare.own) == pytest.approx(float(losses.own))


def test_the_asked_share_of_images_is_turned_each_way_alike() -> None:
    turns = quarter_turns(stream(0, "turn", 0), 40_000, 0.6)
    assert np.bincount(turns, minlength=4) / 40_000 == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.01)
    assert quarter_turns(stream(0, "turn", 0), 100, 0.0).sum() == 0
