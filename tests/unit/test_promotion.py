"""The gates of a promotion: what each lets through, from figures with their errors."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.comparison import Comparison, Difference
from diffusion.evaluation.scores import Row, Scores
from diffusion.evaluation.statistics import Moments, frechet_distance
from diffusion.tracking.gates import Margins, gates_against, gates_alone
from tests.scores import made


def difference(new: Row, old: Row) -> Difference:
    value, spread = new.value - old.value, 1.96 * math.hypot(new.error or 0, old.error or 0)
    return Difference(value, value - spread, value + spread)


def failed(new: Scores, old: Scores, **margins: float) -> list[str]:
    """Names of the gates that hold the new one back, the two having nothing in common."""
    figures = {name: (new.require(name), old.require(name)) for name in ("fid", "bits_per_dim", "memorisation")}
    comparison = Comparison(**{name: difference(*rows) for name, rows in figures.items()})
    gates = gates_against(new, old, comparison, Margins(**margins), lambda name: Difference(2.0, 1.5, 2.5))
    return [gate.name for gate in gates if not gate.passed]


def test_clearly_better_passes_every_gate() -> None:
    assert failed(made(fid=10.0), made()) == []
    assert failed(made(fid=10.0, memorisation=1.1), made()) == [], "not more than new images have"


def test_a_margin_asks_for_more_than_better() -> None:
    assert failed(made(fid=15.0), made()) == []
    assert failed(made(fid=15.0), made(), fid=2.0) == []
    assert failed(made(fid=15.0), made(), fid=3.0) == ["fid_eurosat is lower"]
    surely = {"fid": 10.0, "bits": 3.52, "bits_error": 0.0}
    assert failed(made(**surely), made(bits_error=0.0)) == ["bits_per_dim is not higher"]
    assert failed(made(**surely), made(bits_error=0.0), bits_per_dim=0.03) == []


@pytest.mark.parametrize(
    ("fields", "gate"),
    [
        ({"fid": 19.0}, "fid_eurosat is lower"),  # by less than the errors of both
        ({"fid": 10.0, "bits": 3.7}, "bits_per_dim is not higher"),
        ({"fid": 10.0, "fid_of_class": {"Forest": 5.0, "River": 90.0}}, "no class has collapsed"),
        ({"fid": 10.0, "memorisation": 9.0}, "nothing more is copied"),
    ],
)
def test_each_gate_holds_back_what_it_is_for(fields: dict[str, Any], gate: str) -> None:
    assert failed(made(**fields), made()) == [gate]


@given(st.floats(1, 100), st.floats(1, 100), st.floats(0.1, 10), st.floats(0.1, 10))
def test_of_two_models_at_most_one_beats_the_other(first: float, second: float, error: float, other: float) -> None:
    a, b = made(fid=first, fid_error=error), made(fid=second, fid_error=other)
    assert failed(a, b)[:1] == ["fid_eurosat is lower"] or failed(b, a)[:1] == ["fid_eurosat is lower"]


def test_the_first_version_must_be_better_than_no_model() -> None:
    assert all(gate.passed for gate in gates_alone(made(), 8.0, 100.0))
    assert [gate.name for gate in gates_alone(made(bits=8.2), 8.0, 100.0) if not gate.passed] == [
        "bits_per_dim is below that of no model"
    ]
    assert [gate.name for gate in gates_alone(made(memorisation=12.0), 8.0, 100.0) if not gate.passed] == [
        "nothing is copied"
    ]
    assert [gate.name for gate in gates_alone(made(fid=float("nan")), 8.0, 100.0) if not gate.passed] == [
        "fid_eurosat is below that of one picture for all"
    ]


def test_the_first_version_must_be_better_than_one_picture_beyond_doubt() -> None:
    def passes(spread: float, **fields: Any) -> bool:
        gate = gates_alone(made(**fields), 8.0, spread)[0]
        assert f"one picture, drawn over and over, has at least {spread:.2f}" in gate.figures
        return gate.passed

    assert passes(25.0, fid=20.0, fid_error=1.0)
    assert not passes(15.0, fid=20.0, fid_error=1.0)
    assert not passes(21.0, fid=20.0, fid_error=1.0), "below, but not beyond doubt"
    assert not passes(25.0, fid=20.0, fid_error=5.0), "so few samples say little"
    asked = gates_alone(made(fid=20.0, fid_error=1.0), 8.0, 25.0, margins=Margins(first=0.5))[0]
    assert not asked.passed
    assert "asked for: 0.5 times that" in asked.figures


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_one_picture_for_all_has_at_least_the_spread_of_the_real_features(
    count: int, dimensions: int, seed: int
) -> None:
    """FID's closed form for samples that are all alike (Heusel et al. 2017, eq. 6): the bar is no guess."""
    rng = np.random.default_rng(seed)
    real = Moments.of(rng.standard_normal((count, dimensions)) * rng.uniform(0.1, 5, dimensions))
    alike = Moments.of(np.repeat(rng.standard_normal((1, dimensions)), 7, axis=0))
    spread = np.trace(real.scatter) / (count - 1)
    assert frechet_distance(alike, real) >= spread * (1 - 1e-6)
    nearest_one = Moments.of(np.repeat(real.mean[None], 7, axis=0))
    assert frechet_distance(nearest_one, real) == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "passes"),
    [
        (None, True),
        (Difference(1.8, 1.2, 2.4), False),
        (Difference(1.8, 0.9, 2.7), True),
        (Difference(1.4, 1.2, 1.6), True),
    ],
)
def test_a_class_has_collapsed_only_beyond_what_may_be_luck(ratio: Difference | None, passes: bool) -> None:
    forest = 20 * (ratio.value if ratio else 1.8)
    new, old = made(fid=10.0, fid_of_class={"Forest": forest}), made(fid_of_class={"Forest": 20.0})
    comparison = Comparison(difference(new.require("fid"), old.require("fid")), None, Difference(0, 0, 0))
    gates = {gate.name: gate for gate in gates_against(new, old, comparison, of_class=lambda name: ratio)}
    assert gates["no class has collapsed"].passed == passes
    assert f"{forest / 20:.2f} times" in gates["no class has collapsed"].figures


def test_a_class_that_may_have_had_bad_luck_hides_none_that_has_collapsed() -> None:
    new, old = (made(fid=fid, fid_of_class=parts) for fid, parts in ((10.0, NOW), (20.0, dict.fromkeys(NOW, 20.0))))
    comparison = Comparison(difference(new.require("fid"), old.require("fid")), None, Difference(0, 0, 0))
    intervals = {"Rare": Difference(3.0, 0.8, 7.0), "River": Difference(2.5, 1.9, 3.1), "Unseen": None}
    *_, gate, _ = gates_against(new, old, comparison, of_class=lambda name: intervals[name])
    assert (gate.name, gate.passed) == ("no class has collapsed", False)
    assert "the FID of River is 2.50 times the champion's (1.90 to 3.10, 95 %)" in gate.figures


NOW = {"Rare": 60.0, "River": 50.0, "Unseen": 80.0, "Forest": 20.0}


def test_a_first_version_that_draws_one_picture_for_a_class_does_not_go_live() -> None:
    def failed(**variation: float) -> list[str]:
        return [gate.figures for gate in gates_alone(made(), 8.0, 100.0, variation) if not gate.passed]

    assert failed() == failed(Forest=0.5, River=0.06) == []
    assert failed(Forest=0.5, River=0.01) == ["River varies least: 1% of what its real images do; asked for: 5%"]


def test_a_champion_scored_before_a_figure_existed_is_compared_by_what_both_have() -> None:
    new, old = made(fid=10.0), made()
    earlier = old.model_copy(update={"rows": tuple(row for row in old.rows if row.figure != "spectral_distance")})
    assert failed(new, earlier) == failed(new, old) == []
    assert failed(earlier, new) == failed(old, new) == ["fid_eurosat is lower"]
