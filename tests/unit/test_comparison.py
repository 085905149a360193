"""Two models compared sample by sample: the intervals hold what they should, and pairing narrows them."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import DataError
from diffusion.evaluation.comparison import (
    Comparison,
    Evidence,
    compare,
    load_evidence,
    ratio_of_class,
    variation_of_classes,
)
from diffusion.evaluation.reference import Reference
from diffusion.evaluation.statistics import Moments, frechet_distance, frechet_error
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from tests.scores import made

DIMENSIONS = 4
MOMENTS = Moments(10_001, np.zeros(DIMENSIONS), np.eye(DIMENSIONS) * 10_000)
NOTHING = np.zeros((0, DIMENSIONS), np.float32)
REFERENCE = Reference(MOMENTS, NOTHING, np.zeros(0, np.int64), np.zeros((300, DIMENSIONS), np.float32))


def evidence(
    features: np.ndarray, close: float = 0.05, bits: float = 3.5, labels: np.ndarray | None = None
) -> Evidence:
    rng = np.random.default_rng(0)
    near = rng.random(len(features)) < close
    return Evidence(features.astype(np.float32), near, bits + 0.5 * rng.standard_normal(300), labels)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.floats(-1, 1), st.floats(0.5, 2))
def test_a_model_differs_from_itself_by_nothing_and_from_another_as_that_from_it(
    seed: int, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    a, b = evidence(rng.standard_normal((100, DIMENSIONS))), evidence(scale * rng.standard_normal((100, 4)) + shift)
    same = compare(a, a, REFERENCE)
    for one in (same.fid, same.bits_per_dim, same.memorisation):
        assert one is not None
        assert (one.value, one.low, one.high) == (0, 0, 0)
    there, back = compare(a, b, REFERENCE), compare(b, a, REFERENCE)
    assert there.fid.value == -back.fid.value
    assert (there.fid.low, there.fid.high) == pytest.approx((-back.fid.high, -back.fid.low), abs=1e-9)


def gaussians(rng: np.random.Generator, count: int, common: float) -> Comparison:
    """Of two models that are known: N(0.6, 1) and N(0.3, 1.2^2), whose samples share some of their noise."""
    shared, *own = rng.standard_normal((3, count, DIMENSIONS))
    first, second = (np.sqrt(common) * shared + np.sqrt(1 - common) * noise for noise in own)
    return compare(evidence(0.6 + first), evidence(0.3 + 1.2 * second), REFERENCE)


def test_the_interval_holds_the_true_difference_nineteen_times_in_twenty() -> None:
    # By the closed form: d (0.6^2) - d (0.3^2 + (1.2 - 1)^2), which samples of any finite number overestimate each.
    truth = DIMENSIONS * (0.6**2 - 0.3**2 - 0.2**2)
    rng = np.random.default_rng(0)
    found = [gaussians(rng, 200, common=0.5).fid for _ in range(60)]
    held = sum(one.low <= truth <= one.high for one in found)
    assert 51 <= held < 60  # 57 are expected; fewer than 51 happen once in 300 times
    assert np.mean([one.high - one.low for one in found]) < 1


def test_what_two_models_have_in_common_does_not_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    apart, together = (gaussians(rng, 400, common).fid for common in (0.0, 0.95))
    assert together.high - together.low < 0.6 * (apart.high - apart.low)
    # Without anything in common it is what two errors make.
    a, b = 0.6 + rng.standard_normal((2000, DIMENSIONS)), 0.3 + 1.2 * rng.standard_normal((2000, DIMENSIONS))
    independent = 2 * 1.96 * np.hypot(frechet_error(a, MOMENTS), frechet_error(b, MOMENTS))
    fid = compare(evidence(a), evidence(b), REFERENCE).fid
    assert fid.high - fid.low == pytest.approx(independent, rel=0.25)


def test_images_differ_more_than_models_do() -> None:
    features = np.zeros((300, DIMENSIONS))
    old = evidence(features, bits=3.50)
    new = replace(old, bits=old.bits - 0.01 + 0.005 * np.random.default_rng(2).standard_normal(300))
    bits = compare(new, old, REFERENCE).bits_per_dim
    assert bits is not None
    assert bits.low < -0.01 < bits.high < 0, "each alone is known to 0.03 only"


def test_copies_are_counted_as_a_share_of_what_new_images_have() -> None:
    features = np.zeros((1000, DIMENSIONS))
    none, tenth = evidence(features, close=0), evidence(features, close=0.1)
    memorisation = compare(tenth, none, REFERENCE).memorisation
    assert memorisation.value == pytest.approx(tenth.close.mean() / 0.05)
    assert 1 < memorisation.low < memorisation.value < memorisation.high < 3
    few = compare(tenth, none, replace(REFERENCE, test_features=REFERENCE.test_features[:9])).memorisation
    assert few.value == pytest.approx(tenth.close.mean() / 0.1), (
        "as the figure itself, where no test image is a training image too"
    )


def test_evidence_comes_back_as_it_was_and_not_if_it_is_damaged_or_gone(tmp_path: Path) -> None:
    store, kept = FolderStore(tmp_path), evidence(np.arange(40.0).reshape(10, 4), labels=np.arange(10))
    data = kept.to_bytes()
    scores = made().model_copy(update={"evidence_sha256": hashlib.sha256(data).hexdigest()})
    with pytest.raises(DataError, match="is gone"):
        load_evidence(store, "run", scores)
    store.write(layout.evidence("run", scores.step), data)
    found = load_evidence(store, "run", scores)
    for name in ("features", "close", "bits", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(kept, name))
        assert getattr(found, name).dtype == getattr(kept, name).dtype
    before = evidence(kept.features).to_bytes()  # as protocol 3 left it
    of_then = scores.model_copy(update={"evidence_sha256": hashlib.sha256(before).hexdigest()})
    store.write(layout.evidence("run", scores.step), before)
    found = load_evidence(store, "run", of_then, classes=3)
    np.testing.assert_array_equal(found.labels, np.arange(10) % 3)  # also where a class had too few images for a figure
    store.write(layout.evidence("run", scores.step), data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DataError, match="is damaged"):
        load_evidence(store, "run", scores)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 3))
def test_of_each_class_variation_and_ratio_are_those_of_its_own_samples(seed: int, scale: float) -> None:
    """The other classes' do not matter."""
    rng, classes, label = np.random.default_rng(seed), 3, 1
    drawn = rng.permutation(np.repeat(np.arange(classes), [20, 30, 40]))
    real, labels = rng.standard_normal((300, DIMENSIONS)).astype(np.float32), np.arange(300) % classes
    reference = Reference(Moments.of(real), real, labels, real)
    a, b = rng.standard_normal((2, 90, DIMENSIONS))
    a[drawn == label] *= scale
    found = variation_of_classes(evidence(a, labels=drawn), reference, classes)
    expected = a[drawn == label].var(axis=0).sum() / real[labels == label].var(axis=0).sum()
    assert found[label] == pytest.approx(expected, rel=1e-4, abs=1e-9)
    ratio = ratio_of_class(evidence(a, labels=drawn), evidence(b, labels=drawn), reference, label)
    assert ratio is not None
    moments = Moments.of(real[labels == label])
    distances = [frechet_distance(Moments.of(x[drawn == label].astype(np.float32)), moments) for x in (a, b)]
    assert ratio.value == pytest.approx(distances[0] / distances[1], rel=1e-4)
    assert ratio.low <= ratio.high
    a[drawn == 0] += 7
    again = ratio_of_class(evidence(a, labels=drawn), evidence(b, labels=drawn), reference, label)
    assert again == ratio


def test_a_class_with_few_samples_or_real_images_is_not_judged() -> None:
    rng = np.random.default_rng(0)
    real, labels = rng.standard_normal((30, DIMENSIONS)).astype(np.float32), np.repeat([0, 1], [25, 5])
    reference = Reference(Moments.of(real), real, labels, real)
    few, many = (evidence(rng.standard_normal((count, DIMENSIONS)), labels=np.arange(count) % 2) for count in (10, 40))
    assert variation_of_classes(few, reference, 2) == {}
    assert list(variation_of_classes(many, reference, 2)) == [0]
    assert ratio_of_class(few, few, reference, 0) is None
    assert ratio_of_class(many, many, reference, 1) is None
    same = ratio_of_class(many, many, reference, 0)
    assert same is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)
