"""Scores of a checkpoint, as an evaluation makes them, with the figures that a test asks for."""

from __future__ import annotations

from typing import Any

from diffusion.evaluation.scores import BOUND_BINS, BoundTerms, Row, ScoredBy, Scores

FIGURES: dict[str, float] = {
    "fid": 20.0,
    "fid_extrapolated": 19.0,
    "kid": 1.0,
    "precision": 0.9,
    "recall": 0.6,
    "density": 1.0,
    "coverage": 0.7,
    "memorisation": 0.2,
    "class_accuracy": 0.8,
}
ERRORS = {"fid_error": 1.0, "kid_error": 0.1, "memorisation_error": 0.15, "spectral_distance_error": 0.1}
REAL = {"fid": 0.4, "kid": 0.0, "memorisation": 1.0, "spectral_distance": 0.2}


def made(bits: float = 3.5, bits_error: float = 0.02, **fields: Any) -> Scores:
    """Figures and their errors by name (`fid`, `fid_error`), `fid_of_class`, and fields of Scores."""
    fid_of_class = fields.pop("fid_of_class", {"Forest": 20.0, "River": 40.0})
    errors = {key: fields.pop(key, error) for key, error in ERRORS.items()}
    figures = {key: fields.pop(key, value) for key, value in FIGURES.items()}
    figures["fid_worst_class"] = max(fid_of_class.values())
    extractor = "eurosat"
    rows = [
        Row(figure=key, extractor=extractor, value=value, error=errors.get(f"{key}_error"), real=REAL.get(key))
        for key, value in figures.items()
    ]
    rows += [
        Row(figure="fid_of_class", extractor=extractor, part=name, value=fid) for name, fid in fid_of_class.items()
    ]
    rows.append(Row(figure="bits_per_dim", value=bits, error=bits_error))
    rows += [Row(figure="bits_of_term", part=name, value=1.0) for name in ("prior", "transitions", "decoder")]
    rows.append(Row(figure="spectral_distance", value=0.9, error=0.1, real=0.2))
    bound = BoundTerms(
        total=bits,
        error=bits_error,
        images=400,
        prior=0.01,
        decoder=0.5,
        transitions=((bits - 0.51) / BOUND_BINS,) * BOUND_BINS,
        log_snr_edges=tuple(float(edge) for edge in range(BOUND_BINS + 1)),
        timestep_edges=tuple(range(BOUND_BINS + 1, 0, -1)),
    )
    values: dict[str, Any] = {
        "step": 1,
        "images_seen": 1,
        "checkpoint": "c",
        "weights": "ema-1",
        "fid_by_weights": {},
        "samples": 1000,
        "real_samples": 1000,
        "extractors": (ScoredBy(name=extractor, sha256="e"),),
        "rows": tuple(rows),
        "bound": bound,
        "evidence_sha256": "e",
    }
    return Scores(**values | fields)
