"""The scores of a checkpoint, as they are kept in the store. No torch in here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator

from diffusion.data.sealed import is_sealed, unseal
from diffusion.errors import DataError
from diffusion.store import layout
from diffusion.store.objects import Store

DEVIATIONS = 1.96
"""Standard errors either side of a figure that its 95 % interval spans."""


_OF_FORMAT_1 = [
    "fid",
    "fid_extrapolated",
    "kid",
    "precision",
    "recall",
    "density",
    "coverage",
    "memorisation",
    "class_accuracy",
]


class Row(BaseModel):
    """A figure as it was measured; `figures.py` says what it means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figure: str
    extractor: str | None = None
    """Whose features it is of; None: of none."""
    part: str | None = None
    """The class or the term that it is of; None: of all."""
    value: float
    error: float | None = None
    """Standard error of `value`."""
    real: float | None = None
    """The same of `Scores.real_samples` real test images, of the samples' classes as far as there are such."""

    @model_serializer(mode="wrap")
    def _without_nones(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            key: value for key, value in serialize(self).items() if value is not None
        }  # a dataset may have many classes


class ScoredBy(BaseModel):
    """An extractor whose features figures are of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str


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

    format_version: int = 2
    step: int
    images_seen: int
    checkpoint: str
    """Digest of the checkpoint."""
    weights: str
    """Which of its weights were scored: `model`, or the name of a moving average."""
    fid_by_weights: dict[str, float]
    """Where the best of several moving averages was chosen: the FID of each, of samples that no other score uses."""
    samples: int
    """How many samples were scored; FID falls with their number, so it is part of the figure."""
    real_samples: int
    """How many real test images were held beside them."""
    extractors: tuple[ScoredBy, ...]
    """In the recipe's order; the first decides about promotion."""
    rows: tuple[Row, ...]
    bound: BoundTerms | None
    """None where levels are not counted: such images have no likelihood in bits."""
    evidence_sha256: str | None
    """Of the file with what the scores were computed from, by which two models are compared; only the last of a run has one."""
    protocol: str | None = None
    """How they were made, as `diffusion.evaluation.protocol` has it. Earlier versions did not say."""

    @model_validator(mode="before")
    @classmethod
    def _of_any_format(cls, fields: Any) -> Any:
        return from_format_1(fields) if isinstance(fields, dict) and "by_extractor" in fields else fields

    def find(self, figure: str, part: str | None = None) -> Row | None:
        """A figure, of the extractor that decides if it is of one; None if it was not measured."""
        for row in self.rows:
            if (row.figure, row.part) == (figure, part) and row.extractor in (None, self.extractors[0].name):
                return row
        return None

    def require(self, figure: str) -> Row:
        """As `find`. Raises DataError if it was not measured."""
        row = self.find(figure)
        if row is None:
            raise DataError(f"The scores of step {self.step:,} lack the figure {figure}.")
        return row

    def parts(self, figure: str) -> dict[str, float]:
        """A figure's values by class or term, of the extractor that decides."""
        mine = (row for row in self.rows if row.figure == figure and row.extractor in (None, self.extractors[0].name))
        return {row.part: row.value for row in mine if row.part is not None}


def from_format_1(fields: dict[str, Any]) -> dict[str, Any]:
    """Scores as they were written before figures were rows: a document an extractor, a field a figure.

    Raises ValueError for what never was such a document.
    """
    try:
        new = {key: value for key, value in fields.items() if key != "by_extractor"}
        bound, rows = fields["bound"], []
        if bound is not None:
            rows.append(Row(figure="bits_per_dim", value=bound["total"], error=bound["error"]))
            terms = {"prior": bound["prior"], "transitions": sum(bound["transitions"]), "decoder": bound["decoder"]}
            rows += [Row(figure="bits_of_term", part=name, value=bits) for name, bits in terms.items()]
        for by in fields["by_extractor"]:
            real = {"fid": by["fid_floor"], "kid": by["kid_floor"], "memorisation": 1.0}
            of_class = by["class_fid"] or {}
            values = {key: by[key] for key in _OF_FORMAT_1 if by[key] is not None}
            if of_class:
                values["fid_worst_class"] = max(of_class.values())
            rows += [
                Row(
                    figure=key, extractor=by["extractor"], value=value, error=by.get(f"{key}_error"), real=real.get(key)
                )
                for key, value in values.items()
            ]
            rows += [
                Row(figure="fid_of_class", extractor=by["extractor"], part=name, value=value)
                for name, value in of_class.items()
            ]
        first = fields["by_extractor"][0]
        new["samples"], new["real_samples"] = first["samples"], first["floor_samples"]
        new["extractors"] = [
            {"name": by["extractor"], "sha256": by["extractor_sha256"]} for by in fields["by_extractor"]
        ]
        return {**new, "rows": rows}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no scores of the first format: {error!r}") from error


def find_scores(
    store: Store, run: str, step: int, samples: int, name: str = "", checkpoint: str | None = None
) -> Scores | None:
    """The scores of a finished evaluation with that many samples (and of the checkpoint with that digest), or None.

    None as well for scores that are damaged or of an older form, which are to be made anew.
    """
    try:
        data = store.read(layout.scores(run, step, name))
        # Earlier versions did not seal them.
        scores = unseal(Scores, data) if is_sealed(data) else Scores.model_validate_json(data)
    except (KeyError, ValueError):
        return None
    if checkpoint not in (None, scores.checkpoint):
        return None
    return scores if scores.samples == samples else None
