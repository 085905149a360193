"""Fréchet and kernel distances against closed forms; moments under any cut and order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.labels import as_many_of_each, in_proportion, resampled, shuffled
from diffusion.evaluation.sharding import block_sizes
from diffusion.evaluation.statistics import (
    Moments,
    frechet_distance,
    frechet_error,
    frechet_extrapolated,
    kernel_distance,
    manifold,
    nearest_copies,
)
from diffusion.tracking.gates import not_memorised
from tests.scores import made


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


def test_the_bootstrap_error_is_the_spread_over_fresh_samples() -> None:
    rng = np.random.default_rng(0)
    reference = Moments.of(rng.standard_normal((20_000, 6)))
    fresh = [frechet_distance(Moments.of(rng.standard_normal((300, 6)) + 0.5), reference) for _ in range(60)]
    estimated = frechet_error(rng.standard_normal((300, 6)) + 0.5, reference)
    assert estimated == pytest.approx(np.std(fresh), rel=0.4)


def test_the_errors_of_samples_of_given_classes_leave_out_what_is_no_accident() -> None:
    """Classes far apart: which of them a draw has more of would be most of its error, and no two sets of samples differ in it."""
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    centres = 6 * rng.standard_normal((3, 5))
    reference = Moments.of(np.concatenate([rng.standard_normal((9_000, 5)) + centre for centre in centres]))

    def drawn() -> np.ndarray:
        return centres[labels] + 1.3 * rng.standard_normal((300, 5))

    fresh = [frechet_distance(Moments.of(drawn()), reference) for _ in range(60)]
    features = drawn()
    assert frechet_error(features, reference, labels) == pytest.approx(np.std(fresh), rel=0.4)
    assert frechet_error(features, reference) > 2 * np.std(fresh)
    endless = frechet_distance(Moments.of(np.concatenate([drawn() for _ in range(100)])), reference)
    found = [frechet_extrapolated(features := drawn(), reference, labels) for _ in range(20)]
    assert np.mean(found) == pytest.approx(endless, abs=float(3 * np.std(found) / 20**0.5))
    same, told = (kernel_distance(features, features + 1, labels=one)[1] for one in (None, labels))
    assert told < same


def test_the_kernel_distance_of_samples_of_given_classes_is_unbiased() -> None:
    """Of samples with a fixed number of each class fewer pairs are of one class than chance would have: a perfect model seemed better
    than real images."""
    rng, shares = np.random.default_rng(0), np.array([8, 5, 3, 3, 1])
    centres = 2 * rng.standard_normal((5, 4))
    labels = np.repeat(np.arange(5), 2 * shares)  # forty samples: the fewer, the larger was the bias

    def drawn(of: np.ndarray) -> np.ndarray:
        return centres[of] + rng.standard_normal((len(of), 4))

    told, untold = [], []
    for _ in range(150):
        real = drawn(rng.choice(5, 400, p=shares / shares.sum()))
        samples = drawn(labels)
        told.append(kernel_distance(samples, real, labels=labels)[0])
        untold.append(kernel_distance(samples, real)[0])
    assert abs(np.mean(told)) < 3.5 * np.std(told) / 150**0.5
    assert np.mean(untold) < -8 * np.std(untold) / 150**0.5

    many = np.repeat(np.arange(20), 3)  # of each so few that draws take them as one
    centres = 2 * rng.standard_normal((20, 4))
    few = [kernel_distance(drawn(many), drawn(rng.integers(0, 20, 400)), labels=many)[0] for _ in range(150)]
    assert abs(np.mean(few)) < 3.5 * np.std(few) / 150**0.5


@given(st.lists(st.integers(0, 4), max_size=60), st.lists(st.integers(0, 5), max_size=60))
def test_beside_samples_stand_real_images_of_the_same_classes(wanted: list[int], there: list[int]) -> None:
    found = as_many_of_each(np.array(wanted, np.int64), np.array(there, np.int64))
    assert sorted(found) == list(found), "in their order"
    for label in range(6):
        places = [place for place, one in enumerate(there) if one == label]
        assert [place for place in found if there[place] == label] == places[: wanted.count(label)]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any), st.integers(0, 300))
def test_samples_are_of_the_classes_in_their_proportions(counts: list[int], number: int) -> None:
    labels = in_proportion(np.array(counts), number)
    assert np.array_equal(labels, in_proportion(np.array(counts), number + 7)[:number]), "however many are asked for"
    expected = number * np.array(counts) / sum(counts)
    found = np.bincount(labels, minlength=len(counts))
    assert np.abs(found - expected).max() <= len(counts)
    assert not found[np.array(counts) == 0].any()


def test_classes_of_one_size_come_in_turn() -> None:
    assert in_proportion(np.array([7, 7, 7]), 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@given(st.integers(0, 99), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_draw_has_of_each_class_what_there_is_of_it(seed: int, sizes: list[int]) -> None:
    """Classes of fewer than five samples count as one."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    drawn = labels[resampled(rng, len(labels), labels)]
    strata = np.array([number if size >= 5 else len(sizes) for number, size in enumerate(sizes)])
    assert np.array_equal(np.sort(strata[drawn]), np.sort(strata[labels]))
    mixed = shuffled(rng, len(labels), labels)
    assert sorted(mixed) == list(range(len(labels)))
    half = np.bincount(labels[mixed[: len(labels) // 2]], minlength=len(sizes))
    assert np.abs(half - np.array(sizes) / 2).max() <= 2


def test_errors_of_samples_of_many_classes_are_not_smaller_than_they_are() -> None:
    """A class with a sample or two says nothing of how its samples differ, drawn by itself."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 4))
    reference = Moments.of(rng.standard_normal((5000, 4)))
    free = frechet_error(features, reference)
    for each in (1, 2, 4):
        assert frechet_error(features, reference, labels=np.arange(60) // each) == pytest.approx(free, rel=0.25)


def test_extrapolation_removes_most_of_the_bias_of_few_samples() -> None:
    rng = np.random.default_rng(1)
    reference = of_gaussian(np.zeros(20), np.eye(20))
    biased, extrapolated = [], []
    for seed in range(10):
        features = rng.standard_normal((300, 20))
        biased.append(frechet_distance(Moments.of(features), reference))
        extrapolated.append(frechet_extrapolated(features, reference, seed=seed))
    assert np.mean(biased) > 0.3
    assert abs(np.mean(extrapolated)) < 0.3 * np.mean(biased)


def test_equal_distributions_cover_one_another() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 800, 4))
    measured = manifold(x, y)
    assert measured.precision > 0.9
    assert measured.recall > 0.9
    assert measured.density == pytest.approx(1, abs=0.1)
    # Naeem et al. 2020, eq. 10: the expected coverage of equal distributions is about 1 - 2^-k.
    assert measured.coverage == pytest.approx(1 - 2**-5, abs=0.03)


def test_precision_and_recall_are_not_swapped() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((800, 2))
    narrow = rng.standard_normal((800, 2)) * 0.2  # good samples of little variety
    measured = manifold(real, narrow)
    assert measured.precision > 0.95
    assert measured.recall < 0.3
    wide = manifold(real, rng.standard_normal((800, 2)) * 6)
    assert wide.precision < 0.5 < wide.recall
    far = manifold(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_memorisation_tells_copies_from_new_images() -> None:
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.standard_normal((n, 8)) for n in (3000, 800, 800))
    new = nearest_copies(train, held_out, fresh)
    assert abs(new.ratio - 1) < 4 * new.error
    copies = nearest_copies(train, held_out, train[:800] + 1e-6)
    assert copies.ratio == pytest.approx(20)
    assert (copies.nearest == np.arange(800)).all()
    half = nearest_copies(train, held_out, np.concatenate([train[:400], fresh[:400]]))
    assert half.ratio == pytest.approx(10, abs=1.5)


@pytest.mark.parametrize("held_out", [1, 2])
def test_what_is_copied_is_seen_without_new_images_to_measure_by(held_out: int) -> None:
    train, test = (np.random.default_rng(0).standard_normal((n, 8)) for n in (20, held_out))
    copied = nearest_copies(train, test, train[:16])
    assert not not_memorised(made(memorisation=copied.ratio, memorisation_error=copied.error))


@pytest.mark.parametrize("held_out", [5, 10, 20, 50])
def test_new_images_count_as_new_however_few_are_held_out(held_out: int) -> None:
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        train, test, fresh = (rng.standard_normal((n, 8)) for n in (9 * held_out, held_out, 200))
        found.append(nearest_copies(train, test, fresh))
    ratios = np.array([one.ratio for one in found])
    assert abs(ratios.mean() - 1) < 3.5 * ratios.std() / 300**0.5
    assert ratios.std() == pytest.approx(np.mean([one.error for one in found]), rel=0.35)
    copied = nearest_copies(train, test, train[:20])
    assert not not_memorised(made(memorisation=copied.ratio, memorisation_error=copied.error))
    passed = [not_memorised(made(memorisation=one.ratio, memorisation_error=one.error)) for one in found]
    assert np.mean(passed) > 0.91


@pytest.mark.parametrize("times", [2, 6, 20])
def test_near_copies_of_an_image_that_is_there_many_times_are_seen(times: int) -> None:
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.standard_normal((n, 8)) for n in (1500, 300, 300))
    often = np.concatenate([train, np.repeat(train[:1], times - 1, axis=0)])
    near = train[:1] + 0.01 * rng.standard_normal((100, 8))
    copied = nearest_copies(often, held_out, np.concatenate([near, fresh[:200]]))
    assert copied.close[:100].all()
    assert copied.ratio > 6


def test_images_that_are_there_twice_hide_no_copies() -> None:
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.standard_normal((n, 8)).astype(np.float32) for n in (1500, 800, 800))
    twice = np.concatenate([train, train])
    leaked = np.concatenate([train[:80], held_out[80:]])  # a tenth of the test images are training images
    for real, test in ((twice, held_out), (train, leaked), (twice, leaked)):
        assert nearest_copies(real, test, train[:800]).ratio == pytest.approx(20)
        new = nearest_copies(real, test, fresh)
        assert abs(new.ratio - 1) < 4 * new.error
    assert nearest_copies(train, train[:50], train[:50]).ratio == pytest.approx(20), "no test image is new"
