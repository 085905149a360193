"""The scores of a checkpoint, as they are kept in the store. No torch in here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from diffusion.data.sealed import is_sealed, unseal
from diffusion.data.store import Store

DEVIATIONS = 1.96
"""Standard errors either side of a figure that its 95 % interval spans."""
HEADLINES = ("fid", "kid", "precision", "recall", "memorisation", "class_accuracy")
"""Fields of `SampleScores` that become MLflow metrics under `score/`, beside bits_per_dim and the worst class's FID."""
DETAILS = (
    *("fid_error", "fid_extrapolated", "fid_floor", "kid_error", "kid_floor"),
    *("density", "coverage", "memorisation_error"),
)
"""Those that become MLflow metrics under `score_detail/`."""


class SampleScores(BaseModel):
    """Distances between samples and the real training images under one extractor. Lower is better."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    extractor: str
    extractor_sha256: str
    samples: int
    """How many samples were scored; FID falls with their number, so it is part of the figure."""
    fid: float
    fid_error: float
    """Standard deviation of `fid` over bootstrap draws of the samples."""
    fid_extrapolated: float
    """`fid` of infinitely many samples, by extrapolation."""
    kid: float
    kid_error: float
    """Standard error of `kid`."""
    precision: float
    recall: float
    density: float
    coverage: float
    memorisation: float
    """Share of samples closer to a training image, by that image's own nearest neighbour, than all but 5 % of the test images
    are, over these 5 %: 1 for new images of the same distribution, 20 if all are copies."""
    memorisation_error: float
    """Its standard error."""
    floor_samples: int
    fid_floor: float
    """FID of that many real test images: what a perfect model would get."""
    kid_floor: float
    class_accuracy: float | None
    """Share of class-conditional samples that the extractor takes for their class."""
    class_fid: dict[str, float] | None
    """FID of each class's samples against its real images: n a class is a tenth, so these figures lie higher."""


BOUND_BINS = 20


class BoundTerms(BaseModel):
    """The variational bound on held-out images and its parts, in bits a subpixel (bits/dim)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: float
    error: float
    """Standard error of `total` over images and draws."""
    images: int
    prior: float
    decoder: float
    transitions: tuple[float, ...]
    """The transitions' part, by log_snr of the noisier end in BOUND_BINS equal bins, noise first."""
    log_snr_edges: tuple[float, ...]
    """Edges of these bins, rising."""
    timestep_edges: tuple[int, ...]
    """The timesteps at these edges, falling from T to 1."""


class Scores(BaseModel):
    """All that was measured of one checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    images_seen: int
    checkpoint: str
    """Digest of the checkpoint."""
    weights: str
    """Which of its weights were scored: `model`, or the name of a moving average."""
    fid_by_weights: dict[str, float]
    """Where the best of several moving averages was chosen: the FID of each, of samples that no other score uses."""
    bound: BoundTerms
    by_extractor: tuple[SampleScores, ...]
    """In the recipe's order; the first decides about promotion."""
    evidence_sha256: str | None
    """Of the file with what the scores were computed from, by which two models are compared; only the last of a run has one."""

    def metrics(self) -> dict[str, float]:
        """MLflow metrics: few under `score/`, the rest under `score_detail/`; an extractor's name is part of its figures' names."""
        flat = {"score/bits_per_dim": self.bound.total, "score_detail/bits_per_dim_error": self.bound.error}
        for by in self.by_extractor:
            for section, keys in (("score", HEADLINES), ("score_detail", DETAILS)):
                values = {key: getattr(by, key) for key in keys}
                flat |= {f"{section}/{key}_{by.extractor}": float(v) for key, v in values.items() if v is not None}
            if by.class_fid:
                flat[f"score/fid_worst_class_{by.extractor}"] = max(by.class_fid.values())
        return flat

    def table(self) -> list[tuple[str, float, float | None, float | None]]:
        """All figures: name, value, standard error, and what real test images have. None where there is none."""
        rows: list[tuple[str, float, float | None, float | None]] = [
            ("bits_per_dim", self.bound.total, self.bound.error, None),
            ("bits_per_dim, prior", self.bound.prior, None, None),
            ("bits_per_dim, transitions", sum(self.bound.transitions), None, None),
            ("bits_per_dim, decoder", self.bound.decoder, None, None),
        ]
        for by in self.by_extractor:
            named: list[tuple[str, float | None, float | None, float | None]] = [
                ("fid", by.fid, by.fid_error, by.fid_floor),
                ("fid_extrapolated", by.fid_extrapolated, None, None),
                ("kid", by.kid, by.kid_error, by.kid_floor),
                ("precision", by.precision, None, None),
                ("recall", by.recall, None, None),
                ("density", by.density, None, None),
                ("coverage", by.coverage, None, None),
                ("memorisation", by.memorisation, by.memorisation_error, 1.0),
                ("class_accuracy", by.class_accuracy, None, None),
                *((f"fid of {name}", fid, None, None) for name, fid in (by.class_fid or {}).items()),
            ]
            rows += [
                (f"{name} ({by.extractor}, n = {by.samples:,})", value, error, real)
                for name, value, error, real in named
                if value is not None
            ]
        return rows


def evaluation_folder(run: str, step: int, name: str = "") -> str:
    """Where the results of an evaluation lie in the store; `name` tells those apart that are not the recipe's own."""
    return f"runs/{run}/evaluations/{step:09d}{'-' if name else ''}{name}"


def find_scores(
    store: Store, run: str, step: int, samples: int, name: str = "", checkpoint: str | None = None
) -> Scores | None:
    """The scores of a finished evaluation with that many samples (and of the checkpoint with that digest), or None.

    None as well for scores that are damaged or of an older form, which are to be made anew.
    """
    try:
        data = store.read(f"{evaluation_folder(run, step, name)}/scores.json")
        # Earlier versions did not seal them.
        scores = unseal(Scores, data) if is_sealed(data) else Scores.model_validate_json(data)
    except (KeyError, ValueError):
        return None
    if checkpoint not in (None, scores.checkpoint):
        return None
    return scores if all(by.samples == samples for by in scores.by_extractor) else None
