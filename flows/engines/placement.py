"""How many processes a job has, and on what: asked for as a number or a range, and answered by what a cluster has."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

from diffusion.errors import RecipeError
from diffusion.recipe import Recipe
from diffusion.trust.redaction import shown

PLACEMENT = "placement.json"
"""Beside a job's spec, where a cluster runs it."""
RANGE = r"([0-9]{1,6})(?:-([0-9]{1,6}))?"
"""Of processes: a number, or the least and the most."""


class Host(BaseModel):
    """One machine of a cluster."""

    model_config = ConfigDict(frozen=True)

    cpus: int
    gpus: int


class Capacity(BaseModel):
    """What a cluster has, whoever uses it."""

    model_config = ConfigDict(frozen=True)

    hosts: tuple[Host, ...]

    @property
    def gpus(self) -> int:
        """Of all hosts."""
        return sum(host.gpus for host in self.hosts)

    @property
    def largest(self) -> int:
        """CPUs of the host that has most."""
        return max((host.cpus for host in self.hosts), default=0)

    def __str__(self) -> str:
        cpus, hosts = sum(host.cpus for host in self.hosts), len(self.hosts)
        return f"{cpus} CPUs and {self.gpus} GPUs on {hosts} host{'s' if hosts != 1 else ''}"


class Workers(BaseModel):
    """What a flow's jobs may run on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    counts: tuple[int, ...] = Field(min_length=1)
    """How many processes, rising: each shares the recipe's lanes evenly. More than one only on a cluster."""
    gpu: bool = False
    """Whether each has a GPU of the cluster. It is decided once: a job that has lost its GPUs waits for them."""
    cores: int = 1
    """CPUs of the largest host, for a job that is one process."""


class Placement(BaseModel):
    """What a cluster is asked for by one job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    module: str
    """Of the job."""
    counts: tuple[int, ...] = Field(min_length=1)
    """As in `Workers`."""
    gpu: bool = False
    threads: int = Field(default=1, ge=1)
    """CPUs of each process."""

    @property
    def elastic(self) -> bool:
        """Whether it takes more processes when there is room for them."""
        return len(self.counts) > 1

    @property
    def resources(self) -> dict[str, float]:
        """Of each process, as Ray counts them."""
        return {"CPU": float(self.threads)} | ({"GPU": 1.0} if self.gpu else {})

    def fitting(self, capacity: Capacity) -> tuple[int, ...]:
        """The counts that the hosts could take if nobody else used them, falling: a process is on one host."""
        room = sum(
            min(host.cpus // self.threads, host.gpus) if self.gpu else host.cpus // self.threads
            for host in capacity.hosts
        )
        return tuple(count for count in reversed(self.counts) if count <= room)

    def too_small(self, capacity: Capacity) -> str:
        """What is said where there is not enough."""
        each = f"{self.threads} CPU{'s' if self.threads > 1 else ''}" + (" and a GPU" if self.gpu else "")
        return f"The cluster has {capacity}, and the job needs {self.counts[0]} processes with {each} each."


def sharing(recipe: Recipe, least: int, most: int) -> tuple[int, ...]:
    """The counts that share the recipe's lanes evenly. Raises RecipeError if there is none."""
    if least == most:
        recipe.check_processes(least)
    counts = tuple(count for count in range(least, min(most, recipe.data.lanes) + 1) if recipe.data.lanes % count == 0)
    if not counts:
        raise RecipeError(
            f"No number of processes from {least} to {most} shares data.lanes = {recipe.data.lanes} evenly. Choose a range that "
            "holds a divisor of it."
        )
    return counts


def parse_range(asked: int | str) -> tuple[int, int]:
    """The least and the most of a number of processes or a range: 4, "2-8". Raises RecipeError."""
    found = re.fullmatch(RANGE, str(asked))
    if found is None:
        raise RecipeError(f"processes is {shown(str(asked))}: a number (4) or a range (2-8) is wanted.")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise RecipeError(f"processes is {asked}: a range rises, from 1 on.")
    return least, most
