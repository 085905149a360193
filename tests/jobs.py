"""Training and evaluation jobs, for tests."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any
from unittest import mock

from diffusion.jobs.specs import JobSpec, TrainingJob
from diffusion.recipe import Recipe
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from flows.launcher import run_job
from tests.conftest import Ingested
from tests.ranks import fork_rank

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Trainer:
    """Runs training jobs of one recipe into a store."""

    def __init__(self, ingested: Ingested, tmp_path: Path, recipe: Recipe) -> None:
        self.store, self.tmp_path, self.recipe, self.dataset = (
            ingested.store,
            tmp_path,
            recipe,
            ingested.manifest.digest,
        )

    def common(self, run: str) -> dict[str, Any]:
        return {
            "run": run,
            "store": self.store.uri,
            "dataset": self.dataset,
            "shard_copies": self.tmp_path / "copies",
        }

    def spec(self, run: str, until: int, every: int = 1000) -> TrainingJob:
        return TrainingJob(**self.common(run), recipe=self.recipe, until=until, checkpoint_every=every)

    def folder(self, run: str) -> Path:
        return self.tmp_path / run

    def train(self, run: str, until: int, processes: int) -> str:
        """Train and return the digest of everything that the checkpoint holds."""
        start(self.folder(run), self.spec(run, until), "diffusion.training.job", processes)
        return digest(self.store, run, until)


def start(where: Path, spec: JobSpec, module: str, processes: int) -> None:
    with mock.patch("flows.launcher._start", fork_rank):
        run_job(module, spec, where, processes, threads=1)


def digest(store: FolderStore, run: str, step: int) -> str:
    names = [name for name in store.names(f"{layout.checkpoint(run, step)}/") if not name.endswith("state.json")]
    return hashlib.sha256(b"".join(store.read(name) for name in names)).hexdigest()
