"""Jobs on a Ray cluster, as the flow sees it: a driver is started, watched and ended like a rank of this machine.

Only what runs in the driver and on the cluster imports ray.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from diffusion.errors import ClusterError
from diffusion.jobs.specs import JobSpec
from diffusion.recipe import Recipe
from diffusion.tracking.system import Hosts
from flows.engines.cores import usable_cores
from flows.engines.engine import Job
from flows.engines.placement import PLACEMENT, Capacity, Placement, Workers, parse_range, sharing
from flows.launcher import Listener, rank_environment, run_ranks

DRIVER = "flows.engines.driver"
CAPACITY_SECONDS = 90.0


class RayCluster:
    """An `Engine`."""

    def gpus(self) -> int:
        return cluster_capacity().gpus

    def broken_gpu(self) -> str:
        return ""  # Ray counts what its hosts say that they have

    def workers(self, recipe: Recipe, asked: int | str | None) -> Workers:
        least, most = (1, recipe.data.lanes) if asked is None else parse_range(asked)
        counts = sharing(recipe, least, most)
        there = cluster_capacity()
        placement = Placement(module="", counts=counts, gpu=there.gpus > 0)
        if not placement.fitting(there):
            raise ClusterError(f"{placement.too_small(there)} Ask for fewer, or add hosts (ray start --address …).")
        return Workers(counts=counts, gpu=placement.gpu, cores=there.largest)

    def threads(self, recipe: Recipe) -> int:
        return 1

    def run(self, job: Job, workers: Workers, threads: int | None, listener: Listener) -> None:
        placement = Placement(module=job.spec.MODULE, counts=workers.counts, gpu=workers.gpu, threads=threads or 1)
        run_on_cluster(placement, job.spec, job.folder, listener)

    def watched(self, folder: Path) -> Hosts:
        return Hosts(folder)

    def described(self, workers: Workers) -> str:
        counts = workers.counts
        return f"a Ray cluster ({counts[0] if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'} processes)"


def run_on_cluster(placement: Placement, spec: JobSpec, folder: Path, listener: Listener) -> None:
    """Run a job there. Raises the error that it left if it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLACEMENT).write_text(placement.model_dump_json(), encoding="utf-8")
    run_ranks(DRIVER, spec, folder, [driver_environment()], listener)


def cluster_capacity() -> Capacity:
    """What the cluster has. Raises ClusterError if it can't be used."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(
            "TRAIN_DIFFUSION_ENGINE is ray, which is not installed: make ray, or pip install 'train-diffusion[ray]'."
        )
    command = [sys.executable, "-m", DRIVER, "capacity"]
    try:
        asked = subprocess.run(
            command, env=driver_environment(), capture_output=True, text=True, timeout=CAPACITY_SECONDS
        )
    except subprocess.TimeoutExpired:
        address = os.environ.get("RAY_ADDRESS", "auto")
        raise ClusterError(
            f"The Ray cluster at {address} did not answer within {CAPACITY_SECONDS:.0f} s. Is it up (ray status), and do "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN fit?"
        ) from None
    last = (asked.stdout.strip().splitlines() or ["it said nothing"])[-1]
    if asked.returncode:
        raise ClusterError(last.removeprefix("error: "))
    return Capacity.model_validate_json(last)


def driver_environment() -> dict[str, str]:
    """That of a rank, and what the driver is told of Ray."""
    given = {name: value for name, value in os.environ.items() if name.startswith("RAY_")}
    quiet = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return rank_environment(0, 1, usable_cores()) | given | quiet
