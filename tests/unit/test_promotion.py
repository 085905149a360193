"""The gates of a promotion: what each lets through, from figures with their errors."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.evaluation.comparison import Comparison, Difference
from diffusion.evaluation.scores import BoundTerms, SampleScores, Scores
from diffusion.tracking.promotion import Margins, gates_against, gates_alone


def made(bits: float = 3.5, bits_error: float = 0.02, **fields: Any) -> Scores:
    values: dict[str, Any] = {
        "extractor": "eurosat",
        "extractor_sha256": "e",
        "samples": 1000,
        "fid": 20.0,
        "fid_error": 1.0,
        "fid_extrapolated": 19.0,
        "kid": 1.0,
        "kid_error": 0.1,
        "precision": 0.9,
        "recall": 0.6,
        "density": 1.0,
        "coverage": 0.7,
        "memorisation": 0.2,
        "memorisation_error": 0.15,
        "floor_samples": 1000,
        "fid_floor": 0.4,
        "kid_floor": 0.0,
        "class_accuracy": 0.8,
        "class_fid": {"Forest": 20.0, "River": 40.0},
    }
    bound = BoundTerms(
        total=bits,
        error=bits_error,
        images=400,
        prior=0.0,
        decoder=0.5,
        transitions=(bits,),
        log_snr_edges=(0.0, 1.0),
        timestep_edges=(2, 1),
    )
    by = SampleScores(**values | fields)
    return Scores(
        step=1,
        images_seen=1,
        checkpoint="c",
        weights="ema-1",
        fid_by_weights={},
        bound=bound,
        by_extractor=(by,),
        evidence_sha256="e",
    )


def difference(new: float, old: float, *errors: float) -> Difference:
    spread = 1.96 * math.hypot(*errors)
    return Difference(new - old, new - old - spread, new - old + spread)


def failed(new: Scores, old: Scores, **margins: float) -> list[str]:
    """Names of the gates that hold the new one back, the two having nothing in common."""
    a, b = new.by_extractor[0], old.by_extractor[0]
    comparison = Comparison(
        fid=difference(a.fid, b.fid, a.fid_error, b.fid_error),
        bits_per_dim=difference(new.bound.total, old.bound.total, new.bound.error, old.bound.error),
        memorisation=difference(a.memorisation, b.memorisation, a.memorisation_error, b.memorisation_error),
    )
    return [gate.name for gate in gates_against(new, old, comparison, Margins(**margins)) if not gate.passed]


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
        ({"fid": 10.0, "class_fid": {"Forest": 5.0, "River": 90.0}}, "no class has collapsed"),
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
    assert all(gate.passed for gate in gates_alone(made()))
    assert [gate.name for gate in gates_alone(made(bits=8.2)) if not gate.passed] == [
        "bits_per_dim is below that of no model"
    ]
    assert [gate.name for gate in gates_alone(made(memorisation=12.0)) if not gate.passed] == ["nothing is copied"]
    assert [gate.name for gate in gates_alone(made(fid=float("nan"))) if not gate.passed] == ["fid_eurosat is a number"]
