"""A job as a flow has it, and what a flow asks of the place where its jobs run. `known` has all that there are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion.jobs.specs import JobSpec
from diffusion.recipe import Recipe
from diffusion.tracking.system import Watched
from flows.engines.placement import Workers
from flows.launcher import Listener


@dataclass(frozen=True)
class Job:
    """A job as a part of the flow."""

    spec: JobSpec
    folder: Path
    part: str
    """Of the table that says where the time went."""


class Engine(Protocol):
    """Where jobs run."""

    def gpus(self) -> int:
        """How many GPUs it has. Raises ClusterError if it can't be asked."""
        ...

    def broken_gpu(self) -> str:
        """Why it has no GPU although there is one, as far as it can tell; else empty."""
        ...

    def workers(self, recipe: Recipe, asked: int | str | None) -> Workers:
        """What a recipe's jobs may run on, of the processes that were asked for: a number, a range (`2-8`), or None.

        Raises RecipeError if those can't share the recipe's lanes, or are more than there are; ClusterError if there is no
        cluster.
        """
        ...

    def threads(self, recipe: Recipe) -> int | None:
        """Threads of each process; None: its share of the cores. How an operation's sums are cut depends on them."""
        ...

    def run(self, job: Job, workers: Workers, threads: int | None, listener: Listener) -> None:
        """Run a job to its end. Raises the error that it left if it failed; ended early, it ends the job first."""
        ...

    def watched(self, folder: Path) -> Watched:
        """The machines that the jobs of the run in this folder run on, for the metrics of what they do meanwhile."""
        ...

    def described(self, workers: Workers) -> str:
        """What a training ran on, for its model's card."""
        ...
