"""What may be cleaned up: checkpoints and model versions that nothing live, recent or under way comes from.

Kept are every version that has an alias (champion, challenger, or one of your own) or a copy in another model, the last champions,
and the newest versions; and the checkpoints of the runs that made these (but for the merely newest), of all runs that those went
on from, of runs under way and theirs, and of the newest runs. Never touched: the models of other projects on the same server, and
MLflow runs with their metrics, pictures and galleries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion.recipe import Start
from diffusion.tracking.run import RUN_KEY, START_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
    runs = _all(client.search_runs, [experiment_id], order_by=["attributes.start_time DESC"])
    by_key = {run.data.tags[RUN_KEY]: run for run in runs if RUN_KEY in run.data.tags}
    by_id = {run.info.run_id: key for key, run in by_key.items()}
    needed = {key for key, run in by_key.items() if run.info.status == "RUNNING"} | set(list(by_key)[:keep_runs])

    superseded = []
    models = _all(client.search_registered_models)
    known = {model.name: _all(client.search_model_versions, f"name = '{model.name}'") for model in models}
    # What somebody has copied into a model of their own lives from the version's files.
    copied = {version.source for versions in known.values() for version in versions}
    for model in models:
        # The server may have models of others: only versions that our runs made, and no copies of them, are ours to clean up.
        versions = [v for v in known[model.name] if v.run_id in by_id and v.source.startswith(LOGGED_MODEL)]
        versions.sort(key=lambda version: int(version.version), reverse=True)
        aliased = {str(version) for version in model.aliases.values()}
        live = aliased | set(champions.get(model.name, []))
        live |= {str(v.version) for v in versions if f"models:/{v.name}/{v.version}" in copied}
        needed |= {by_id[v.run_id] for v in versions if str(v.version) in live}
        kept = live | {str(v.version) for v in versions[:keep_versions]}
        superseded += [(model.name, str(v.version)) for v in versions if str(v.version) not in kept]
    for key in list(needed):
        while (start := _start(by_key, key)) is not None and start.run not in needed:
            needed.add(key := start.run)
    return Superseded(tuple(key for key in by_key if key not in needed), tuple(superseded))


def _start(by_key: dict[str, Any], key: str) -> Start | None:
    text = by_key[key].data.tags.get(START_TAG) if key in by_key else None
    return Start.model_validate_json(text) if text else None


def _all(search: Any, *arguments: Any, **options: Any) -> list[Any]:
    """Every page of a search."""
    found, token = [], None
    while True:
        page = search(*arguments, **options, page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found
