"""A version's card: what the model is, how good, what it may be used for, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusion.data.manifest import Manifest
from diffusion.data.sources.eurosat import EUROSAT_DIGEST
from diffusion.errors import UserError
from diffusion.evaluation.figures import TELLING, Figure, full_name, in_order, with_interval
from diffusion.evaluation.pictures import grid_caption
from diffusion.evaluation.scores import Row, Scores
from diffusion.features.identity import OwnExtractor
from diffusion.presentation.markdown import plain
from diffusion.presentation.templates import template
from diffusion.training.state import CheckpointState
from diffusion.trust.redaction import shown

TEMPLATE = "model_card.md"

MOST_CLASSES = 40
"""That a card lists by name."""


@dataclass(frozen=True)
class Card:
    """What a card says."""

    name: str
    """Of the registered model."""
    state: CheckpointState
    scores: Scores
    dataset: Manifest
    commits: tuple[str, ...]
    """Of the code that trained it, the newest last: more than one where a run went on after something was mended."""
    run_id: str
    """MLflow's."""
    compute: str
    """What the training took."""
    own: OwnExtractor | None
    """What is known of the dataset's own extractor."""

    def text(self, folder: Path, decision: str = "Not judged yet.") -> str:
        """As Markdown, by the template in a folder. Raises UserError if it is not there."""
        if not (folder / TEMPLATE).exists():
            raise UserError(
                f"{folder / TEMPLATE} is missing: run the flow from a checkout of the project, which has it."
            )
        figures = [(one, row) for one, row in in_order(self.scores) if one.place in ("headline", "score")]
        told = [f"{full_name(row)} {row.value:.{one.digits}f}" for one, row in figures if one.name in TELLING]
        rows = [(full_name(row), with_interval(row), _real(one, row)) for one, row in figures]
        spec, recipe = self.dataset.images, self.state.recipe
        if self.scores.bound is None:
            rows.append(("bits_per_dim", f"none: images of {spec.dtype} have no likelihood in bits", ""))
        return template(TEMPLATE, folder).render(
            # The list of versions shows the first line alone.
            headline=f"{', '.join(told)}: {recipe.name}, seed {recipe.seed}",
            name=self.name,
            state=self.state,
            recipe=recipe,
            dataset=self.dataset,
            scores=self.scores,
            spec=spec,
            shape=f"{spec.dtype} [8, {recipe.data.image_size}, {recipe.data.image_size}, {len(spec.bands)}]",
            rows=rows,
            meanings=[(one.name, one.legend) for one in dict(figures)],
            grid=grid_caption(spec, recipe.network.class_conditional),
            classes=_listed(spec.classes) if recipe.network.class_conditional else "none: the model is unconditional",
            extractors="; ".join(_about(extractor.name, self.own) for extractor in self.scores.extractors),
            limits=_limits(self.dataset),
            commits=self.commits,
            run_id=self.run_id,
            compute=self.compute,
            decision=decision,
        )


def _real(one: Figure, row: Row) -> str:
    return "" if row.real is None else f"{row.real:.{one.digits}f}"


def _listed(classes: tuple[str, ...]) -> str:
    """Class names, made by somebody else, as text of a page."""
    names = ", ".join(plain(shown(name, 60)).replace("|", "/").replace("`", "'") for name in classes[:MOST_CLASSES])
    return f"{names} and {len(classes) - MOST_CLASSES:,} more" if len(classes) > MOST_CLASSES else names


def _about(extractor: str, own: OwnExtractor | None) -> str:
    if extractor.startswith("own-"):
        found = f": {own.told}" if own else ""
        return f"`{extractor}` is a small network that was trained on this dataset itself{found}"
    return f"`{extractor}` is the same network for every model that it judges"


def _limits(dataset: Manifest) -> str:
    if dataset.digest == EUROSAT_DIGEST:
        return (
            "It imitates 10 m Sentinel-2 patches of the European places that EuroSAT covers, and knows nothing else. Its images are "
            "not observations: do not use them as evidence of any place."
        )
    return (
        f"It imitates the images of {dataset.source}, and knows nothing else. What these show, what they leave out, and who may use "
        "them for what, the project does not know. Its images are not observations: do not use them as evidence of anything."
    )
