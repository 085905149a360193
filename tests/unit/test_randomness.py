"""Counter-based streams, noise levels, and the order of the samples: pure functions of their arguments."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.data.order import Order
from diffusion.process.levels import log_normal, stratified_uniforms
from diffusion.randomness import stream


def test_a_stream_depends_on_each_of_its_arguments_and_on_nothing_else() -> None:
    first = stream(1, "noise", 5, 2).standard_normal(8)
    np.random.default_rng().standard_normal(100)
    assert np.array_equal(first, stream(1, "noise", 5, 2).standard_normal(8))
    for other in (
        stream(2, "noise", 5, 2),
        stream(1, "order", 5, 2),
        stream(1, "noise", 6, 2),
        stream(1, "noise", 5, 3),
    ):
        assert not np.intersect1d(first, other.standard_normal(8)).size


def test_streams_of_neighbouring_positions_are_uncorrelated() -> None:
    draws = np.stack([stream(0, "noise", position).standard_normal(2000) for position in range(40)])
    correlation = np.corrcoef(draws) - np.eye(40)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


@given(st.integers(1, 300), st.integers(0, 1000))
def test_stratified_uniforms_fall_one_in_each_stretch(count: int, position: int) -> None:
    values = np.sort(stratified_uniforms(stream(0, "level", position), count))
    assert ((values > 0) & (values < 1)).all()
    shifted = np.sort((values - values[0]) * count)
    np.testing.assert_allclose(shifted, np.arange(count), atol=1e-6)


def test_log_normal_levels_have_the_asked_moments() -> None:
    uniforms = torch.from_numpy(stratified_uniforms(stream(0, "level"), 100_000))
    levels = log_normal(uniforms, 1.0, 2.0, -10, 10)
    assert float(levels.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(levels.std()) == pytest.approx(2.0, abs=0.01)
    assert torch.isfinite(levels).all()


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=9).map(tuple)


@given(sizes, st.integers(1, 10), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_sample_exactly_once(sizes: tuple[int, ...], window: int, seed: int, epoch: int) -> None:
    order = Order(sizes, window, seed)
    shards, places = order.at(epoch * order.epoch_samples, order.epoch_samples)
    assert sorted(zip(shards.tolist(), places.tolist(), strict=True)) == [
        (shard, place) for shard, size in enumerate(sizes) for place in range(size)
    ]


@given(sizes, st.integers(1, 10), st.integers(0, 200), st.integers(1, 60), st.integers(1, 7))
def test_any_cut_of_the_order_gives_the_same_samples(
    sizes: tuple[int, ...], window: int, start: int, count: int, parts: int
) -> None:
    order = Order(sizes, window, seed=3)
    whole = np.stack(order.at(start, count))
    cuts = np.linspace(0, count, parts + 1).astype(int)
    pieces = [np.stack(order.at(start + a, b - a)) for a, b in pairwise(cuts) if b > a]
    assert np.array_equal(whole, np.concatenate(pieces, axis=1))


@given(sizes, st.integers(1, 4), st.integers(0, 3))
def test_a_window_holds_whole_shards_and_no_others(sizes: tuple[int, ...], window: int, seed: int) -> None:
    order = Order(sizes, window, seed)
    shards, _ = order.at(0, order.epoch_samples)
    seen: list[set[int]] = []
    position = 0
    while position < order.epoch_samples:
        members: set[int] = set()
        # A window ends when all samples of all its shards have come.
        taken = 0
        while taken == 0 or taken < sum(sizes[shard] for shard in members):
            members.add(int(shards[position + taken]))
            taken += 1
        seen.append(members)
        position += taken
    assert all(len(members) <= window for members in seen)
    assert sum(map(len, seen)) == len(sizes)


@given(sizes, st.integers(1, 5), st.integers(0, 300))
def test_a_window_is_known_before_it_is_read(sizes: tuple[int, ...], window: int, position: int) -> None:
    order = Order(sizes, window, seed=2)
    end, shards = order.window(position)
    assert end > position
    read, _ = order.at(position, end - position)
    assert set(read.tolist()) <= set(shards)
    assert sum(sizes[shard] for shard in shards) >= end - position
    assert order.window(end)[0] > end


def test_seeking_far_reads_no_more_than_its_window() -> None:
    order = Order(tuple([800] * 30), 8, seed=1)
    shards, _ = order.at(1000 * order.epoch_samples + 12_345, 400)
    assert len(set(shards.tolist())) <= 8
    assert not np.array_equal(shards, order.at(12_345, 400)[0]), "epochs have orders of their own"
