"""What each job is told: the file `job.json` of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from diffusion.features.identity import ExtractorName
from diffusion.recipe import Evaluation, Recipe
from diffusion.settings import InceptionSource
from diffusion.trust.identifiers import RunName, Sha256

SPEC = "job.json"


class JobSpec(BaseModel):
    """What every job is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    MODULE: ClassVar[str]
    """Of the job's body: a rank is `python -m MODULE FOLDER`."""

    run: RunName
    """Name of the run, part of every path; of a job that belongs to a dataset, what it makes."""
    store: str
    """URI of the store."""
    dataset: Sha256
    """Digest of the dataset."""
    shard_copies: Path
    """Folder for local copies of a remote store's shards."""
    deterministic: bool = False
    """Whether GPUs use deterministic algorithms alone."""

    @property
    def compiled(self) -> Path:
        """Folder for code that torch compiles, in the same private one as that of the copies."""
        return self.shard_copies.parent / "compiled"


class TrainingJob(JobSpec):
    """What the training job is told."""

    MODULE = "diffusion.training.job"

    recipe: Recipe
    until: int
    """Step to train to."""
    checkpoint_every: int
    """Steps between checkpoints on the way; the newest of these stay, and those at the recipe's milestones for ever."""


class ReferenceJob(JobSpec):
    """What the job that measures the real images is told."""

    MODULE = "diffusion.evaluation.measure_reference"

    image_size: int
    extractor: ExtractorName
    inception: InceptionSource | None = None


class ExtractorJob(JobSpec):
    """What the job that trains a dataset's own extractor is told."""

    MODULE = "diffusion.features.train_extractor"


class EvaluationJob(JobSpec):
    """What the evaluation job is told."""

    MODULE = "diffusion.evaluation.job"

    step: int
    """Step of the checkpoint to score."""
    evaluation: Evaluation | None = None
    """How to score, where it is not as the checkpoint's recipe says."""
    name: RunName | Literal[""] = ""
    """Name of such an evaluation, part of where its results go."""
    weights: str | None = None
    """Which of the checkpoint's weights; None: of several moving averages the one with the lowest FID."""
    inception: InceptionSource | None = None
