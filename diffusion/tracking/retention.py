"""What may be cleaned up: checkpoints and model versions that nothing live, recent or under way comes from.

Kept are every version that has an alias (champion, challenger, or one of your own) or a copy in another model, the last champions,
and the newest versions; and the checkpoints of the runs that made these (but for the merely newest), of all runs that those went
on from, of runs under way and theirs, and of the newest runs that nobody has deleted in MLflow. Never touched: the models of other
projects on the same server, and MLflow runs with their metrics, pictures and galleries.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from diffusion.recipe import Start
from diffusion.tracking.run import RUN_KEY, START_TAG
from diffusion.tracking.version_tags import tags_of
from diffusion.trust.identifiers import run_name
from diffusion.trust.redaction import shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

LOGGED_MODEL = "models:/m-"
"""What the source of a version that a run has made begins with."""


@dataclass(frozen=True)
class Superseded:
    """What nothing needs any more."""

    runs: tuple[str, ...]
    """Keys of the runs whose checkpoints may go."""
    versions: tuple[tuple[str, str], ...]
    """Model and number."""


def find_superseded(
    client: MlflowClient, experiment_id: str, keep_runs: int, keep_versions: int, champions: dict[str, list[str]]
) -> Superseded:
    """Look through all runs and versions.

    Args:
        keep_runs: the newest runs that keep their checkpoints.
        keep_versions: the newest versions of each model that are kept.
        champions: by model, the versions that were champion, the newest last; as many of them as are listed are kept.
    """
    from mlflow.entities import ViewType

    newest_first = ["attributes.start_time DESC"]
    runs = _all(client.search_runs, [experiment_id], run_view_type=ViewType.ALL, order_by=newest_first)
    ours = [(said, run) for run in runs if (said := _read(run)) is not None]
    starts: dict[str, set[str]] = {}
    for said, _ in ours:
        starts.setdefault(said.key, set()).update({said.start.run} if said.start else set())
    by_id = {run.info.run_id: said.key for said, run in ours}
    # A key is said by several runs only if somebody has made one say it: whichever is under way counts.
    there = [(said.key, run) for said, run in ours if run.info.lifecycle_stage == "active"]
    needed = {key for key, run in there if run.info.status == "RUNNING"}
    needed |= set(list(dict.fromkeys(key for key, _ in there))[:keep_runs])

    superseded = []
    models = _all(client.search_registered_models)
    known: dict[str, list[Any]] = {model.name: [] for model in models}
    for version in _all(client.search_model_versions):  # of all models: a name may be anything, and spoil a query
        known.setdefault(version.name, []).append(version)
    # What somebody has copied or registered in a model of their own lives from the version's files.
    sources: dict[str, list[Any]] = {}
    for version in (version for versions in known.values() for version in versions):
        sources.setdefault(version.source, []).append(version)
    for model in models:
        # The server may have models of others: only versions that our runs made, and no copies of them, are ours to clean up.
        versions = [v for v in known[model.name] if v.run_id in by_id and made_by_its_run(v, sources[v.source])]
        versions.sort(key=lambda version: int(version.version), reverse=True)
        aliased = {str(version) for version in model.aliases.values()}
        live = aliased | set(champions.get(model.name, []))
        live |= {
            str(v.version) for v in versions if f"models:/{v.name}/{v.version}" in sources or len(sources[v.source]) > 1
        }
        needed |= {by_id[v.run_id] for v in versions if str(v.version) in live}
        kept = live | {str(v.version) for v in versions[:keep_versions]}
        superseded += [(model.name, str(v.version)) for v in versions if str(v.version) not in kept]
    open_ends = list(needed)
    while open_ends:
        new = starts.get(open_ends.pop(), set()) - needed
        needed |= new
        open_ends += new
    return Superseded(tuple(key for key in starts if key not in needed), tuple(superseded))


def made_by_its_run(version: Any, of_the_source: list[Any]) -> bool:
    """Whether a run made this version: people can make others, in models of their own, of the same files.

    Args:
        of_the_source: all versions of these files.
    """
    first = min(of_the_source, key=lambda one: (one.creation_timestamp, one.name, int(one.version)))
    is_first = (version.name, version.version) == (first.name, first.version)
    return bool(version.source.startswith(LOGGED_MODEL) and is_first and "checkpoint.digest" in tags_of(version))


@dataclass(frozen=True)
class _Said:
    """What a run says of itself in its tags."""

    key: str
    start: Start | None


def _read(run: Any) -> _Said | None:
    """None for a run that is none of ours: without our tags, or with some that we can't have written."""
    tags = run.data.tags
    if RUN_KEY not in tags:
        return None
    try:
        start = Start.model_validate_json(tags[START_TAG]) if tags.get(START_TAG) else None
        return _Said(run_name(tags[RUN_KEY]), start)
    except ValidationError:
        log.warning(
            "The MLflow run %s (%s) is passed over: its tags can't be ours.", run.info.run_id, shown(tags[RUN_KEY])
        )
        return None


def _all(search: Any, *arguments: Any, **options: Any) -> list[Any]:
    """Every page of a search."""
    found, token = [], None
    while True:
        page = search(*arguments, **options, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found
