"""The figures: measured of features whose distribution is known, and of images whose spectrum is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.evaluation.figures import FIGURES, Features, in_order, measured, metrics, table
from diffusion.evaluation.reference import Reference
from diffusion.evaluation.scores import Row
from diffusion.evaluation.spectrum import Spectra, distance, distance_error, first_powers, powers
from diffusion.evaluation.statistics import Moments, frechet_distance
from diffusion.presentation.plots import as_png, class_distances
from tests.scores import made
from tests.specs import spec as spec_of

DIMENSIONS = 4


def of_features(shift: float = 0.0, labelled: bool = True) -> dict[str, dict[str | None, Row]]:
    """The figures, by name and part, of samples that lie `shift` from the real images; class 0 lies 10 from class 1."""
    rng = np.random.default_rng(0)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % 2
        return (rng.standard_normal((count, DIMENSIONS)) + 10 * labels[:, None]).astype(np.float32), labels

    (train, train_labels), (test, test_labels), (samples, labels) = drawn(1000), drawn(400), drawn(200)
    features = Features(
        samples + np.float32(shift),
        labels if labelled else None,
        Reference(Moments.of(train), train, train_labels, test),
        ("first", "second") if labelled else (),
        (lambda found: (found.mean(axis=1) > 5).astype(np.int64)) if labelled else None,
        test[:200],
        test_labels[:200] if labelled else None,
    )
    found: dict[str, dict[str | None, Row]] = {}
    for row in measured(features, "known"):
        assert row.extractor == "known"
        found.setdefault(row.figure, {})[row.part] = row
    expected = frechet_distance(Moments.of(test[:200]), Moments.of(train))
    assert found["fid"][None].real == expected, "of as many real images as there are samples"
    return found


def test_figures_of_features_say_how_far_samples_are() -> None:
    near, far = of_features(), of_features(shift=3.0)
    assert far["fid"][None].value - near["fid"][None].value == pytest.approx(9 * DIMENSIONS, rel=0.1)
    assert near["class_accuracy"][None].value == 1
    assert set(near["fid_of_class"]) == {"first", "second"}
    assert near["fid_worst_class"][None].value == max(row.value for row in near["fid_of_class"].values())
    for figure, rows in near.items():
        closer = [rows[part].value for part in rows]
        further = [far[figure][part].value for part in rows]
        if FIGURES[figure].better == "lower is better":
            assert closer < further, figure
        if FIGURES[figure].better == "higher is better":
            assert closer >= further, figure
    assert near["memorisation"][None].real == 1


def test_figures_that_mean_nothing_without_classes_are_not_there() -> None:
    without = of_features(labelled=False)
    assert not {"class_accuracy", "fid_worst_class", "fid_of_class"} & set(without)
    assert "fid" in without


def test_errors_and_what_real_images_have_stand_beside_a_figure_everywhere() -> None:
    scores = made(fid=12.0, fid_error=0.5)
    flat = metrics(scores)
    assert flat["score/fid_eurosat"] == 12.0
    assert (flat["score_detail/fid_error_eurosat"], flat["score_detail/fid_floor_eurosat"]) == (0.5, 0.4)
    assert flat["score/spectral_distance"] == 0.9
    assert not [name for name in flat if "of_class" in name or "Forest" in name]
    rows = {name: values for name, *values in table(scores)}
    assert rows["fid_eurosat (n = 1,000)"] == [12.0, 0.5, 0.4]
    assert rows["fid_of_class_eurosat, Forest (n = 1,000)"] == [20.0, None, None]
    assert rows["bits_per_dim (400 test images)"] == [3.5, 0.02, None]
    retired = scores.model_copy(update={"rows": (*scores.rows, Row(figure="no more", value=1.0))})
    assert in_order(retired) == in_order(scores)


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 33), st.integers(1, 5), st.integers(0, 1000))
def test_a_band_s_power_over_all_frequencies_is_its_mean_square(size: int, bands: int, seed: int) -> None:
    """Parseval, for waves of whole cycles that fit the rings: a ring's mean times its members."""
    rng = np.random.default_rng(seed)
    cycles = int(rng.integers(1, size // 2 + 1))
    wave = np.cos(2 * np.pi * cycles * np.arange(size) / size)
    scale = rng.uniform(1, 100, bands)
    images = np.broadcast_to(wave[None, :, None, None] * scale, (2, size, size, bands))
    found = powers(images)
    assert found.shape == (2, bands, size // 2)
    frequencies = np.fft.fftfreq(size, 1 / size)
    radius = np.hypot(frequencies[:, None], frequencies[None, :]).round()
    members = np.array([(radius == ring).sum() for ring in range(1, size // 2 + 1)])
    np.testing.assert_allclose((found * members).sum(axis=2), np.square(images).mean(axis=(1, 2)), rtol=1e-9)
    assert (found.argmax(axis=2) == cycles - 1).all()


def test_white_noise_is_flat_and_twice_the_levels_are_six_decibels() -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((600, 32, 32, 2))
    spectrum = powers(noise)
    np.testing.assert_allclose(spectrum.mean(axis=0) * 32**2, 1, rtol=0.05)
    assert distance(spectrum, spectrum) == 0
    assert distance(powers(2 * noise), spectrum) == pytest.approx(20 * np.log10(2), rel=1e-3)
    again = powers(rng.standard_normal((600, 32, 32, 2)))
    assert distance(again, spectrum) < 0.3 < distance(powers((noise + np.roll(noise, 1, axis=1)) / 2), spectrum)


def test_the_error_of_a_distance_is_its_spread_over_other_samples() -> None:
    rng = np.random.default_rng(0)
    real = powers(rng.standard_normal((2000, 16, 16, 1)))
    drawn = [powers(1.2 * rng.standard_normal((100, 16, 16, 1))) for _ in range(60)]
    spread = np.std([distance(samples, real) for samples in drawn], ddof=1)
    assert distance_error(drawn[0], real) == pytest.approx(spread, rel=0.4)


def test_levels_beyond_those_that_a_network_draws_are_no_distance() -> None:
    rng = np.random.default_rng(0)
    spec = spec_of(bands=1, dtype="uint16", low=(0.0,), high=(3000.0,))
    drawn, real = rng.integers(0, 3001, (2, 300, 16, 16, 1)).astype(np.uint16)
    real[rng.random(real.shape) < 2e-4] = 65535
    assert distance(powers(drawn), powers(spec.clipped(real))) < 0.5 < distance(powers(drawn), powers(real))


def test_classes_may_be_called_anything() -> None:
    names = {"$5_$": 20.0, "a$_$b": 30.0, "x|y": 40.0}
    assert as_png(class_distances(made(fid_of_class=names))).startswith(b"\x89PNG")


def test_an_even_grey_image_has_no_power_and_a_distance_to_it_is_finite() -> None:
    grey = powers(np.full((3, 16, 16, 1), 7, np.uint8))
    assert np.abs(grey).max() < 1e-20
    assert np.isfinite(distance(grey, powers(np.random.default_rng(0).random((3, 16, 16, 1)))))


def test_no_more_images_are_looked_at_than_asked_for() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(first_powers([images[:20], images[20:]], 30), powers(images[:30]))
    assert len(first_powers([images], 80)) == 50
    rows = measured(Spectra(powers(images[:10]), powers(images), powers(images[10:])))
    assert [row.figure for row in rows] == ["spectral_distance"]
