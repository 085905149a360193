"""Fréchet and kernel distances against closed forms; moments under any cut and order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.sharding import block_sizes
from diffusion.evaluation.statistics import Moments, frechet_distance, kernel_distance


def of_gaussian(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(count=1001, mean=mean, scatter=covariance * 1000)


def test_frechet_distance_of_commuting_gaussians_is_the_difference_of_their_roots() -> None:
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    a, b = rng.uniform(0.1, 3, 6), rng.uniform(0.1, 3, 6)
    mean = rng.standard_normal(6)
    first = of_gaussian(mean, rotation @ np.diag(a) @ rotation.T)
    second = of_gaussian(np.zeros(6), rotation @ np.diag(b) @ rotation.T)
    expected = np.square(mean).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_any_gaussians_against_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = (m @ m.T for m in rng.standard_normal((2, 5, 5)))
    first, second = of_gaussian(np.zeros(5), a), of_gaussian(np.ones(5), b)
    expected = 5 + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_singular_covariances_is_finite_and_zero_to_itself() -> None:
    features = np.random.default_rng(2).standard_normal((10, 40))  # rank 9 in 40 dimensions
    assert frechet_distance(Moments.of(features), Moments.of(features)) == pytest.approx(0, abs=1e-6)


@given(st.integers(2, 60), st.integers(1, 59), st.integers(0, 1000))
def test_moments_of_parts_merge_to_those_of_the_whole(count: int, cut: int, seed: int) -> None:
    features = np.random.default_rng(seed).standard_normal((count, 3)) * 5 + 100
    cut = min(cut, count - 1)
    whole = Moments.of(features)
    for first, second in ((features[:cut], features[cut:]), (features[cut:], features[:cut])):
        merged = Moments.of(first).merge(Moments.of(second))
        assert merged.count == whole.count
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-8, atol=1e-8)


def test_moments_are_those_of_numpy() -> None:
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    np.testing.assert_allclose(Moments.of(features).covariance, np.cov(features.T.astype(np.float64)), rtol=1e-12)


def test_kernel_distance_is_zero_on_average_for_equal_distributions_and_not_for_others() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3000, 8))
    same, error = kernel_distance(x, y)
    assert abs(same) < 4 * error + 0.02
    apart, _ = kernel_distance(x, y + 1)
    # For a linear kernel the distance would be |shift|^2 / d = 1; the cubic one gives three times that and more.
    assert apart > 3


def test_kernel_distance_is_reproducible() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 600, 4))
    assert kernel_distance(x, y) == kernel_distance(x, y)


@given(st.integers(1, 500), st.integers(1, 60))
def test_blocks_cover_everything_once(total: int, block: int) -> None:
    sizes = block_sizes(total, block)
    assert sum(sizes) == total
    assert all(size == block for size in sizes[:-1])
