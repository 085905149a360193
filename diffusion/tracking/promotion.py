"""Which version is live: a challenger takes the champion's place only where named gates, each with its figures, say so.

Every promotion is an entry of a log in the store, `promotions/<model>/<number>.json`, made before the alias is moved: of several
runs that end at once, one writes the next entry, and the others judge again, against the new champion.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from diffusion.data.manifest import find_dataset
from diffusion.errors import DataError, TrackingError
from diffusion.evaluation.comparison import (
    Difference,
    compare,
    load_evidence,
    ratio_of_class,
    variation_of_classes,
)
from diffusion.evaluation.protocol import TOLD
from diffusion.evaluation.reference import Reference, load_reference
from diffusion.evaluation.scores import Scores
from diffusion.presentation.markdown import fit_description, plain
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.tracking.gates import DEFAULT_MARGINS, Gate, Margins, gates_against, gates_alone, gates_table
from diffusion.tracking.promotion_log import Promotion, is_applied, read_log
from diffusion.tracking.scores_tag import scores_of
from diffusion.tracking.version_tags import tags_of
from diffusion.trust.identifiers import run_name
from diffusion.trust.redaction import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow.entities.model_registry import ModelVersion

    from mlflow import MlflowClient

CHAMPION, CHALLENGER = "champion", "challenger"
COMPARABLE = ("dataset.digest", "image_size", "evaluation.protocol")
"""Tags that must agree before two figures are compared."""
DECISION_SECTION = re.compile(r"^## Decision\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
"""Of a model card."""
ATTEMPTS = 20


@dataclass(frozen=True)
class Decision:
    """Which alias a version got, and why."""

    model: str
    version: str
    alias: str
    reason: str
    gates: tuple[Gate, ...] = ()
    against: str | None = None
    """The version that was champion then."""


@dataclass(frozen=True)
class Scored:
    """A champion's scores, and where what they were made from lies."""

    run: str
    scores: Scores
    evaluation: str = ""
    """Name of the evaluation, where it is not the run's own."""


if TYPE_CHECKING:
    ScoreAgain = Callable[[ModelVersion], Scored]


def decide(
    client: MlflowClient,
    store: Store,
    model: str,
    version: str,
    margins: Margins = DEFAULT_MARGINS,
    score_again: ScoreAgain | None = None,
) -> Decision:
    """Judge a version against the champion and give it the alias `champion` or `challenger`; a promotion is never repeated.

    Args:
        score_again: scores a champion as the version was scored, where their figures do not compare as they are.

    Raises TrackingError if other runs promote without end.
    """
    for _ in range(ATTEMPTS):
        entries = read_log(store, model)
        _complete(client, store, model, entries)
        _end_challenge(client, model)
        challenger, champion = client.get_model_version(model, version), champion_version(client, model)
        if written := [entry for entry in entries if entry.is_of(challenger)]:
            # Promoted before: whatever was done with the alias since, by a later run or by hand, stays.
            decision = _decision(model, written[-1])
            _tell(client, decision)  # whoever wrote the entry may not have come to that
            return decision
        if _number(champion) == version:
            return Decision(model, version, CHAMPION, "It was made champion by hand.")
        alias, reason, gates = _judge(store, challenger, champion, margins, score_again)
        decision = Decision(model, version, alias, reason, gates, _number(champion))
        if alias == CHALLENGER:
            _tell(client, decision)
            newest = _by_alias(client, model, CHALLENGER)
            if newest is None or int(newest.version) < int(version):  # an older run may be retried
                client.set_registered_model_alias(model, CHALLENGER, version)
            return decision
        if _number(champion_version(client, model)) != _number(champion):  # moved by hand meanwhile
            continue
        entry = Promotion(_number(champion), version, reason, gates, challenger.run_id)
        if store.create(layout.promotion(model, len(entries)), entry.to_bytes()):
            _tell(client, decision)
            _complete(client, store, model, [*entries, entry])
            _end_challenge(client, model)
            return decision
    raise TrackingError(f"Version {version} of {model} could not be judged: other runs were promoted {ATTEMPTS} times.")


def _end_challenge(client: MlflowClient, model: str) -> None:
    """Take the alias `challenger` from a version that is champion by now, by whatever hand."""
    champion, challenger = champion_version(client, model), _by_alias(client, model, CHALLENGER)
    if champion is not None and challenger is not None and _number(champion) == _number(challenger):
        client.delete_registered_model_alias(model, CHALLENGER)


def _decision(model: str, entry: Promotion) -> Decision:
    return Decision(model, entry.to, CHAMPION, entry.reason, entry.gates, entry.before)


def _judge(
    store: Store,
    challenger: ModelVersion,
    champion: ModelVersion | None,
    margins: Margins,
    score_again: ScoreAgain | None,
) -> tuple[str, str, tuple[Gate, ...]]:
    new = scores_of(challenger, store)
    if new is None:
        raise DataError(
            f"Version {challenger.version} of {challenger.name} has no scores that can be read: it can't be judged."
        )
    dataset = find_dataset(store, tags_of(challenger)["dataset.digest"])
    classes = dataset.images.classes if dataset else ()
    try:
        if champion is None:
            opening = "It is the first version"
            bits = dataset.images.bits_of_no_model if dataset else math.inf
            varied, spread = _variation(store, challenger, new, classes), _spread(store, challenger, new)
            gates = gates_alone(new, bits, spread, varied, margins)
        else:
            opening, old = _comparable(store, challenger, champion, new, score_again)
            gates = _against(store, challenger, champion, new, old, margins, classes)
    except DataError as error:
        return CHALLENGER, f"{error} Move the alias champion by hand if it is to go live.", ()
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        return CHALLENGER, f"{opening}: it fails '{failed[0].name}' ({failed[0].figures}).", gates
    return CHAMPION, f"{opening}: {gates[0].figures}; all {len(gates)} gates passed.", gates


def _variation(store: Store, version: ModelVersion, scores: Scores, classes: tuple[str, ...]) -> dict[str, float]:
    """By class, what its samples vary as a share of what its real images do; empty without classes."""
    if not scores.parts("fid_of_class"):
        return {}
    evidence = load_evidence(store, tags_of(version)["run"], scores, classes=len(classes))
    found = variation_of_classes(evidence, _reference(store, version, scores), len(classes))
    return {classes[label]: share for label, share in found.items()}


def _spread(store: Store, version: ModelVersion, scores: Scores) -> float:
    """The total variance of the real images' features."""
    train = _reference(store, version, scores).train
    return float(np.trace(train.scatter)) / (train.count - 1)


def _reference(store: Store, version: ModelVersion, scores: Scores) -> Reference:
    """The real images by which a version was scored."""
    by, tags = scores.extractors[0], tags_of(version)
    name = layout.reference(tags["dataset.digest"], by.name, by.sha256, int(tags["image_size"]))
    return load_reference(store, name)


def _comparable(
    store: Store,
    challenger: ModelVersion,
    champion: ModelVersion,
    new: Scores,
    score_again: ScoreAgain | None,
) -> tuple[str, Scored]:
    """The champion's scores by the challenger's protocol, and how a verdict by them begins. Raises DataError if there are none."""
    opening, old = f"Against version {champion.version}", scores_of(champion, store)
    if different := _differences(challenger, champion, new, old):
        why = f"Its figures can't be compared with those of version {champion.version}: they differ in {', '.join(different)}."
        if score_again is None:
            raise DataError(why)
        try:
            return f"{opening}, scored again as this one was", score_again(champion)
        except DataError as error:
            raise DataError(f"{why} {error}") from None
    assert old is not None
    try:
        return opening, Scored(run_name(tags_of(champion).get("run")), old)
    except ValueError:
        raise DataError(f"The tag 'run' of version {champion.version}, the champion, names no run.") from None


def _differences(challenger: ModelVersion, champion: ModelVersion, new: Scores, old: Scores | None) -> list[str]:
    """In what the scores of two versions were made differently, with both values."""
    ours, theirs = tags_of(challenger), tags_of(champion)
    found = {tag: (ours.get(tag, "none"), theirs.get(tag, "none")) for tag in COMPARABLE}
    if old is None:
        return [*_said(found), "the form of their scores"]
    found["the extractor"] = (new.extractors[0].sha256[:12], old.extractors[0].sha256[:12])
    found["the number of samples"] = (f"{new.samples:,}", f"{old.samples:,}")
    return _said(found)


def _said(found: dict[str, tuple[str, str]]) -> list[str]:
    return [f"{name} ({a}; the champion's: {shown(b, 300)})" for name, (a, b) in found.items() if a != b]


def _against(
    store: Store,
    challenger: ModelVersion,
    champion: ModelVersion,
    new: Scores,
    old: Scored,
    margins: Margins,
    classes: tuple[str, ...],
) -> tuple[Gate, ...]:
    """The gates of a challenger against the champion. Raises DataError if what they were scored from is gone."""
    reference = _reference(store, challenger, new)
    first = load_evidence(store, tags_of(challenger)["run"], new, classes=len(classes))
    second = load_evidence(store, old.run, old.scores, old.evaluation, len(classes))

    def of_class(name: str) -> Difference | None:
        return ratio_of_class(first, second, reference, classes.index(name)) if name in classes else None

    comparison = compare(first, second, reference)
    if len({tags_of(one).get("evaluation.protocol", "").endswith(TOLD) for one in (challenger, champion)}) > 1:
        comparison = replace(comparison, bits_per_dim=None)  # of images given their class, and of images: no one figure
    return gates_against(new, old.scores, comparison, margins, of_class)


def _number(version: ModelVersion | None) -> str | None:
    """A version's number as text: a database gives it as a number, a server as text."""
    return str(version.version) if version is not None else None


def _tell(client: MlflowClient, decision: Decision) -> None:
    """Keep the decision on the version: as tags, and in its card."""
    client.set_model_version_tag(decision.model, decision.version, "decision", decision.reason)
    gates = {gate.name: f"{'passed' if gate.passed else 'FAILED'}: {gate.figures}" for gate in decision.gates}
    client.set_model_version_tag(decision.model, decision.version, "gates", json.dumps(gates))
    card = client.get_model_version(decision.model, decision.version).description or ""
    table = f"\n{gates_table(decision.gates)}\n" if decision.gates else ""
    section = f"## Decision\n\n{plain(decision.reason)}\n{table}\n"
    # Not made anew from its template: what people have written into it stays.
    card, found = DECISION_SECTION.subn(lambda _: section, card)
    card = fit_description(card if found else f"{card}\n{section}")
    client.update_model_version(decision.model, decision.version, card)


def _complete(client: MlflowClient, store: Store, model: str, entries: list[Promotion]) -> None:
    """Move the alias as the log's last entry says, if whoever wrote it did not come to that."""
    while entries and not is_applied(store, model, len(entries) - 1):
        client.set_registered_model_alias(model, CHAMPION, entries[-1].to)
        store.write(layout.promotion_applied(model, len(entries) - 1), b"")
        # A slow writer may have moved it back after another had moved it on: the log's end decides.
        newer = read_log(store, model)
        if len(newer) > len(entries):
            client.set_registered_model_alias(model, CHAMPION, newer[-1].to)
        entries = newer


def champion_version(client: MlflowClient, model: str) -> ModelVersion | None:
    """The version that is live, or None."""
    return _by_alias(client, model, CHAMPION)


def _by_alias(client: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            return None
        raise
