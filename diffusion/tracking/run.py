"""The MLflow run of a flow run: found again on a retry, filled from the journal, closed by its owner."""

from __future__ import annotations

import json
import logging
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from diffusion.data.manifest import Manifest
from diffusion.evaluation.figures import metrics, table, telling_metrics
from diffusion.evaluation.pictures import thumbnail
from diffusion.evaluation.scores import Scores
from diffusion.presentation.plots import bound_by_noise_level, class_distances, fid_over_training
from diffusion.recipe import Recipe, Start, flatten
from diffusion.store import layout
from diffusion.tracking.experiment import NOTE, show_columns
from diffusion.tracking.pages import run_page, runs_page
from diffusion.tracking.promotion import Decision
from diffusion.tracking.version_tags import EARLIER_COMMITS
from diffusion.trust.identifiers import run_name
from diffusion.trust.reading import parse_json
from diffusion.trust.redaction import fit_to_leave

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Run as MlflowRun

    from mlflow import MlflowClient

log = logging.getLogger(__name__)

RUN_KEY, OWNER_TAG, START_TAG = "train_diffusion.run", "train_diffusion.owner", "recipe.start"
THUMBNAIL = 1024  # the only size that the UI shows, also where it fills the screen
MLFLOW_DIGEST_LENGTH = 36


@dataclass(frozen=True)
class Lineage:
    """What a run came from."""

    key: str
    """By which the run is found again: one for each flow run, unless it goes on with an earlier one."""
    name: str
    """How people know a run that is new."""
    commit: str
    """Git commit of the code, with `-dirty` if files differ from it."""
    flow_run_id: str
    flow_run_url: str
    owner: str
    """The process that runs it, as text."""


class TrackedRun:
    """One MLflow run. Everything that is logged twice is there once."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, started: int, name: str) -> None:
        self.client, self.run_id, self.experiment_id, self.started = client, run_id, experiment_id, started
        self.name = name
        """As it was begun: a flow run that goes on with it takes it too."""
        self.commit, self.earlier_commits = "", ""
        """Of the code that it runs on; and of that which it ran on before, with commas between, empty where that was the same."""

    @classmethod
    def open(
        cls,
        client: MlflowClient,
        experiment_id: str,
        lineage: Lineage,
        recipe: Recipe,
        dataset: Manifest,
        store_uri: str,
    ) -> TrackedRun:
        """The run of that key: a new one, or the one that an earlier attempt began."""
        from mlflow.entities import Param, RunTag

        tags = {  # pages show the first ones first
            "mlflow.source.name": "train-diffusion",
            "mlflow.source.git.commit": lineage.commit,
            "dataset.name": dataset.source,
            "git.commit": lineage.commit,
            "dataset.digest": dataset.digest,
            "recipe.digest": recipe.digest,
            "prefect.flow_run_id": lineage.flow_run_id,
            "prefect.flow_run_url": lineage.flow_run_url,
            OWNER_TAG: lineage.owner,
            NOTE: _note(recipe, dataset, lineage),
        }
        found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{lineage.key}'", max_results=1)
        if found:
            run = found[0]
            known = run.data.tags
            if earlier := _joined([known.get(EARLIER_COMMITS, ""), known.get("git.commit", "")], lineage.commit):
                tags[EARLIER_COMMITS] = earlier
            client.update_run(run.info.run_id, "RUNNING")
            if "failure" in run.data.tags:
                client.delete_tag(run.info.run_id, "failure")
        else:
            # With its start from the first moment: a retry goes on as it began.
            start = {START_TAG: recipe.start.model_dump_json()} if recipe.start else {}
            run = client.create_run(experiment_id, run_name=lineage.name, tags={**tags, RUN_KEY: lineage.key, **start})
        self = cls(client, run.info.run_id, experiment_id, run.info.start_time, run.info.run_name or lineage.name)
        self.commit, self.earlier_commits = lineage.commit, tags.get(EARLIER_COMMITS, "")
        client.log_batch(
            self.run_id,
            params=[Param(key, value) for key, value in flatten(recipe).items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        self.log_text(recipe.model_dump_json(indent=1) + "\n", "recipe.json")
        self._log_dataset(dataset, store_uri)
        return self

    def goes_on_by(self, commit: str) -> bool:
        """Have it, and what is made of it from now on, say what code it goes on by. Returns whether that is another one."""
        from mlflow.entities import RunTag

        if commit == self.commit:
            return False
        earlier = _joined([self.earlier_commits, self.commit], commit)
        tags = {"mlflow.source.git.commit": commit, "git.commit": commit, EARLIER_COMMITS: earlier}
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        self.commit, self.earlier_commits = commit, earlier
        return True

    def _log_dataset(self, dataset: Manifest, store_uri: str) -> None:
        import numpy as np
        from mlflow.data.schema import TensorDatasetSchema
        from mlflow.entities import Dataset, DatasetInput, InputTag
        from mlflow.types import Schema, TensorSpec

        spec = dataset.images
        schema = TensorDatasetSchema(
            Schema([TensorSpec(np.dtype(spec.dtype), (-1, *spec.shape(spec.size)), "images")]),
            Schema([TensorSpec(np.dtype(np.int64), (-1,), "labels")]) if spec.classes else None,
        )
        where = f"{store_uri}/{layout.manifest(dataset.digest)}"
        entity = Dataset(
            name=dataset.source,
            digest=dataset.digest[:MLFLOW_DIGEST_LENGTH],
            source_type="s3" if store_uri.startswith("s3://") else "local",
            source=json.dumps({"uri": where}),
            schema=json.dumps(schema.to_dict()),
            profile=json.dumps(
                {f"{split} images": count for split, count in dataset.splits.items()}
                | {"classes": len(spec.classes), "bands": len(spec.bands), "shards": len(dataset.shards)}
            ),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("digest", dataset.digest)]
        self.client.log_inputs(self.run_id, datasets=[DatasetInput(entity, tags)])

    def log_metrics(
        self,
        rows: list[tuple[str, float, int]],
        model_id: str | None = None,
        milliseconds_a_step: int = 1,
        later: int = 0,
    ) -> None:
        """Log (name, value, step) rows in as few calls as can be.

        A point's time is the run's start plus `milliseconds_a_step` for each step, so that MLflow knows a repeated row for
        the same one and keeps it once. Of several points of a step it shows the one of the latest time.

        Args:
            later: milliseconds that are added.
        """
        from mlflow.entities import Metric

        for start in range(0, len(rows), 1000):
            metrics = [
                Metric(name, value, self.started + step * milliseconds_a_step + later, step, model_id=model_id)
                for name, value, step in rows[start : start + 1000]
            ]
            self.client.log_batch(self.run_id, metrics=metrics)

    def log_scores(self, scores: Scores, grid: bytes, closest: bytes, history: list[Scores]) -> None:
        """Log an evaluation: its metrics, its figures, and its grid as the next of the series that the UI shows with a slider.

        Args:
            history: this run's evaluations so far, this one the last.
        """
        rows = [(key, value, scores.step) for key, value in metrics(scores).items()]
        for later, group in self._by_corrections(rows).items():
            self.log_metrics(group, later=later)
        show_columns(self.client, self.client.get_experiment(self.experiment_id), telling_metrics(scores))
        self.log_image("samples", scores.step, grid)
        self._log_file(closest, f"figures/closest-{scores.step:09d}.png")
        self.log_figure(fid_over_training(history), "figures/fid_over_training.png")
        if scores.bound is not None:
            self.log_figure(bound_by_noise_level(scores.bound), f"figures/bound-{scores.step:09d}.png")
        if scores.parts("fid_of_class"):
            self.log_figure(class_distances(scores), f"figures/classes-{scores.step:09d}.png")
        self._log_table(f"scores/{scores.step:09d}.json", ("figure", "value", "error", "real images"), table(scores))

    def _by_corrections(self, rows: list[tuple[str, float, int]]) -> dict[int, list[tuple[str, float, int]]]:
        """The rows, by how much later they are than what their step has already: of an evaluation that was made again, by another
        protocol. What has the same value as then is the same row.
        """

        def known(name: str, step: int) -> list[tuple[float, int]]:
            points = self.client.get_metric_history(self.run_id, name)
            return [(point.value, point.timestamp - self.started - step) for point in points if point.step == step]

        name, _, step = rows[0]
        if not known(name, step):  # an evaluation's first time
            return {0: rows}
        found: dict[int, list[tuple[str, float, int]]] = {}
        for name, value, step in rows:
            others = [later for other, later in known(name, step) if other != value]
            found.setdefault(max(others, default=-1) + 1, []).append((name, value, step))
        return found

    def log_decision(self, decision: Decision) -> None:
        """Log why a version was promoted or not: a table of gates, and a tag."""
        if rows := [(gate.name, gate.passed, gate.figures) for gate in decision.gates]:
            self._log_table("promotion.json", ("gate", "passed", "figures"), rows)
        self.client.set_tag(self.run_id, "promotion", f"{decision.alias}: {decision.reason}"[:5000])

    def _log_table(self, path: str, columns: tuple[str, ...], rows: Sequence[Sequence[object]]) -> None:
        """As `MlflowClient.log_table` does it, but a repetition replaces the rows in place of adding them again."""
        self.client.log_text(self.run_id, json.dumps({"columns": columns, "data": rows}), path)
        tag = "mlflow.loggedArtifacts"
        entry = {"path": path, "type": "table"}
        try:
            listed = parse_json(self.client.get_run(self.run_id).data.tags.get(tag, "[]"))
        except ValueError:
            listed = None
        if not isinstance(listed, list):  # somebody has changed it: the UI could not read it either
            listed = []
        if entry not in listed:
            self.client.set_tag(self.run_id, tag, json.dumps([*listed, entry]))

    def _log_file(self, content: bytes, path: str) -> None:
        folder, _, name = path.rpartition("/")
        with tempfile.TemporaryDirectory() as here:
            file = Path(here, name)
            file.write_bytes(content)
            self.client.log_artifact(self.run_id, str(file), folder)

    def log_image(self, key: str, step: int, png: bytes) -> None:
        """The picture of a step in the series `key`, which the UI shows with a slider.

        As `MlflowClient.log_image` does it, but under a name that the content decides: a repetition overwrites.
        """
        name = uuid.uuid5(uuid.NAMESPACE_URL, f"{self.run_id}/{key}/{step}")
        stem = f"{key}+step+{step}+timestamp+{self.started + step}+{name}"
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, f"{stem}.png").write_bytes(png)
            Path(folder, f"{stem}+compressed.webp").write_bytes(thumbnail(png, THUMBNAIL))
            self.client.log_artifacts(self.run_id, folder, "images")
        self.client.set_tag(self.run_id, "mlflow.loggedImages", "True")

    def log_figure(self, figure: Figure, path: str) -> None:
        """Log a figure as an artifact."""
        self.client.log_figure(self.run_id, figure, path)

    def log_text(self, text: str, path: str) -> None:
        """Log a text as an artifact."""
        self.client.log_text(self.run_id, text, path)

    def conclude(self, sentence: str, page: str) -> None:
        """Put the outcome and a link to an artifact on top of what the run's page says."""
        gallery, table = run_page(self.experiment_id, self.run_id, page), runs_page(self.experiment_id)
        conclusion = f"{sentence} [Gallery]({gallery}) · [All runs]({table})\n\n"
        note = self.client.get_run(self.run_id).data.tags.get(NOTE, "")
        self.client.set_tag(self.run_id, NOTE, conclusion + note.removeprefix(conclusion))

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str = "") -> None:
        """End the run, with the reason if it did not finish."""
        if reason:
            self.client.set_tag(self.run_id, "failure", fit_to_leave(reason)[:5000])
        self.client.set_terminated(self.run_id, status)


def unfinished_run(
    client: MlflowClient, experiment_id: str, recipe: Recipe, dataset: Manifest, commit: str
) -> str | None:
    """Key of the newest run of that recipe, dataset and code, if it failed or was stopped: what it has is worth going on with.

    None if the newest one finished, or if the code is not known exactly.
    """
    newest = _newest_run(client, experiment_id, recipe, dataset, commit)
    return run_key(newest) if newest and newest.info.status in ("FAILED", "KILLED") else None


def finished_run(
    client: MlflowClient, experiment_id: str, recipe: Recipe, dataset: Manifest, commit: str
) -> str | None:
    """Key of the newest run of that recipe (its seed is part of it), dataset and code, if it finished and no other code had a part."""
    newest = _newest_run(client, experiment_id, recipe, dataset, commit, " and attributes.status = 'FINISHED'")
    return run_key(newest) if newest and EARLIER_COMMITS not in newest.data.tags else None


def _joined(before: list[str], commit: str) -> str:
    """The commits that came before one, in their order, each once, with commas between."""
    return ",".join(dict.fromkeys(one for one in ",".join(before).split(",") if one not in ("", commit)))


def run_key(run: MlflowRun) -> str | None:
    """The run's key, which becomes a path; None if it says none that is ours."""
    try:
        return run_name(run.data.tags.get(RUN_KEY))
    except ValueError:
        log.warning("The MLflow run %s is passed over: its tag %s can't be ours.", run.info.run_id, RUN_KEY)
        return None


def _newest_run(
    client: MlflowClient, experiment_id: str, recipe: Recipe, dataset: Manifest, commit: str, condition: str = ""
) -> MlflowRun | None:
    if commit == "unknown" or commit.endswith("-dirty"):
        return None
    wanted = {"recipe.digest": recipe.digest, "dataset.digest": dataset.digest, "git.commit": commit}
    same = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
    order = ["attributes.start_time DESC"]
    found = client.search_runs([experiment_id], same + condition, order_by=order, max_results=1)
    return found[0] if found else None


def recorded_start(client: MlflowClient, experiment_id: str, flow_run_id: str) -> tuple[bool, Start | None]:
    """Whether a flow run has begun its MLflow run, and the checkpoint that it then went on from."""
    # By the run's key as well, which has the id of the flow run that began it: another may have gone on with it since.
    for query in (f"tags.`prefect.flow_run_id` = '{flow_run_id}'", f"tags.`{RUN_KEY}` LIKE '%{flow_run_id}'"):
        for run in client.search_runs([experiment_id], query, max_results=1):
            text = run.data.tags.get(START_TAG)
            try:
                return True, Start.model_validate_json(text) if text else None
            except ValidationError:
                log.warning("The MLflow run %s is passed over: its tag %s can't be ours.", run.info.run_id, START_TAG)
    return False, None


def _note(recipe: Recipe, dataset: Manifest, lineage: Lineage) -> str:
    """What the run's page says at its top."""
    return (
        f"**{recipe.name}** on **{dataset.source}** ({dataset.splits['train']:,} training images, {recipe.data.image_size} x "
        f"{recipe.data.image_size}), seed {recipe.seed}, {recipe.data.images:,} images in {recipe.total_steps:,} steps"
        + (f", from step {recipe.start.step:,} of {recipe.start.run} on" if recipe.start else "")
        + ".\n\n"
        + f"Code `{lineage.commit[:12]}`, dataset `{dataset.digest[:12]}`, recipe `{recipe.digest[:12]}`"
        + (f", [flow run]({lineage.flow_run_url})." if lineage.flow_run_url else ".")
    )
