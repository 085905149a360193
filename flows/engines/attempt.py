"""One start of a job on the cluster: room for its workers, the workers, and what comes back from them."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RuntimeEnvSetupError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from diffusion.errors import ClusterError, StoreError
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import SPEC
from diffusion.jobs.stopping import StopRequest
from diffusion.store.objects import Store
from diffusion.tracking.system import HOSTS
from diffusion.training.journal import JOURNAL, TIMING, Journal, commit, committed_step, records
from diffusion.training.state import checkpoint_file, load_state
from diffusion.trust.private import put
from flows.engines.placement import Capacity, Host, Placement
from flows.engines.worker import Mailbox, Worker

FOR_WORKERS = ("AWS_", "TRAIN_DIFFUSION_STORE", "SSL_CERT_")
"""Beginnings of the names of variables that workers need to reach the store."""
WAIT_SECONDS = 300.0
"""That a job waits for room, until others leave it or a lost host comes back."""
PLACING_SECONDS = 10.0
"""That Ray may take to find room for the workers, where there is some."""
START_SECONDS = 300.0
"""And to start them: a host may have to import much from a slow disk."""
POLL_SECONDS = 0.3
"""Between two looks at whether it is asked to stop."""

log = logging.getLogger(__name__)


def capacity() -> Capacity:
    """What the hosts of the cluster have."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Capacity(hosts=tuple(Host(cpus=int(have.get("CPU", 0)), gpus=int(have.get("GPU", 0))) for have in alive))


@dataclass(frozen=True)
class Place:
    """Room for a number of workers, which nobody else gets."""

    group: Any
    workers: int


def reserve(placement: Placement, stop: StopRequest) -> Place | None:
    """The most room that is free, as soon as there is enough; None if it is asked to stop before. Raises ClusterError."""
    deadline, said = time.monotonic() + WAIT_SECONDS, False
    while not stop.is_made():
        for workers in placement.fitting(capacity()):
            group = placement_group([placement.resources] * workers, strategy="SPREAD")
            # A host that has just died may still be counted: what can't be placed in a while is asked for no longer.
            if group.wait(timeout_seconds=PLACING_SECONDS):
                return Place(group, workers)
            remove_placement_group(group)
            if stop.is_made():
                return None
        short = placement.too_small(capacity())
        if time.monotonic() > deadline:
            raise ClusterError(f"{short} For {WAIT_SECONDS:.0f} s there was no room for them.")
        if not said:
            said = True
            print(f"There is no room now. {short} Waiting for {WAIT_SECONDS:.0f} s.", flush=True)
        time.sleep(1.0)
    return None


def growth(placement: Placement, workers: int) -> int:
    """The larger number of workers that there is free room for; 0 if there is none."""
    free = ray.available_resources()
    for more in placement.fitting(capacity()):
        if more > workers and all(
            free.get(name, 0) >= each * (more - workers) for name, each in placement.resources.items()
        ):
            return more
    return 0


class Attempt:
    """The job on a number of workers, until they end. Raises ClusterError for a host that can't run it.

    If it is asked to stop while they start, it has ended before it begins.
    """

    def __init__(
        self, folder: Path, placement: Placement, store: Store, marker: str, place: Place, stop: StopRequest
    ) -> None:
        self.folder, self.store, self.place = folder, store, place
        self.run_name: str = json.loads((folder / SPEC).read_text(encoding="utf-8"))["run"]
        self.reports: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.listens = False
        """Whether the job would take a request to stop as one, and can go on from where it is."""
        self._progress = ProgressFile(folder, active=True)
        self._hosts: dict[str, dict[str, float]] = {}
        self._behind = 0
        """The step of a checkpoint whose journal is not here yet."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox: Any = ray.remote(Mailbox)
        self.mailbox = mailbox.options(num_cpus=0, scheduling_strategy=here).remote()
        secrets = {name: value for name, value in os.environ.items() if name.startswith(FOR_WORKERS)}
        ray.get(self.mailbox.prepare.remote(secrets))
        told = {
            "module": placement.module,
            "spec": (folder / SPEC).read_text(encoding="utf-8"),
            "mailbox": self.mailbox,
            "marker": marker,
            "committed": committed_step(folder),
        }
        worker: Any = ray.remote(Worker)
        self._ranks: list[Any] = []
        self._running: list[Any] = []
        for bundle in range(place.workers):
            within = PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=bundle)
            options = {"num_cpus": float(placement.threads), "num_gpus": float(placement.gpu)}
            self._ranks.append(worker.options(**options, scheduling_strategy=within).remote())
        try:
            places = self._meet(stop)
            if not places:
                return
            first = {address: rank for rank, (address, _) in reversed(list(enumerate(places)))}
            told["watchers"] = list(first.values())  # one on each host
            self._running = [
                one.run.remote(told, rank, place.workers, places[0]) for rank, one in enumerate(self._ranks)
            ]
        except (RuntimeEnvSetupError, ActorDiedError) as error:
            if isinstance(error, ActorDiedError) and not error.actor_init_failed:
                self.failure = error  # its host has just been lost
                return
            self.end()
            raise ClusterError(
                f"A host of the cluster can't run a worker: {_last_line(str(error))} Every host needs this project's "
                "environment: make ray."
            ) from error
        except GetTimeoutError as error:
            self.failure = error

    def _meet(self, stop: StopRequest) -> list[tuple[str, int]]:
        """Where each rank may be met, once all are there; nothing if it is asked to stop before. Raises what Ray says of them."""
        met, deadline = [rank.meet.remote() for rank in self._ranks], time.monotonic() + START_SECONDS
        while not stop.is_made():
            try:
                return list(ray.get(met, timeout=POLL_SECONDS))
            except GetTimeoutError:
                if time.monotonic() > deadline:
                    raise
        return []

    def wait(self, seconds: float) -> bool:
        """Wait a while for the ranks to end; returns whether all have, or one has failed."""
        if self.failure is None and self._running:
            ended, self._running = ray.wait(self._running, timeout=seconds)
            try:
                ray.get(ended)
            except Exception as error:  # what a rank raised, or that it is no more
                self.failure = error
        return self.failure is not None or not self._running

    def end(self) -> None:
        """Leave no rank behind."""
        for one in self._ranks:
            ray.kill(one)
        remove_placement_group(self.place.group)
        ray.kill(self.mailbox)

    def ask_to_stop(self) -> None:
        """Have the training leave a checkpoint and end."""
        self.mailbox.ask_to_stop.remote()

    def collect(self) -> None:
        """Bring what the workers have said to the folder."""
        for message in ray.get(self.mailbox.take.remote()):
            self.listens |= message.get("listens", False)
            if "error" in message:
                self.reports.append(message["error"])
            if "progress" in message and message["rank"] == 0:
                self._progress.write(**message["progress"])
            if "timing" in message:
                self._keep_timing(message["timing"])
            if "machine" in message:
                self._hosts |= message["machine"]
                put(self.folder / HOSTS, json.dumps(self._hosts).encode(), Path.replace)
            self._behind = max(self._behind, message.get("committed", 0))
        if self._behind > committed_step(self.folder):
            self._keep_journal(self._behind)

    def _keep_timing(self, timing: str) -> None:
        """Put what the workers have measured in the place of what an earlier attempt measured of the same steps."""
        if new := records(timing.encode()):
            kept = Journal(self.folder / TIMING)
            before = [record for record in records(kept.read()) if record["step"] < new[0]["step"]]
            kept.roll_back("".join(json.dumps(record) + "\n" for record in [*before, *new]).encode())

    def _keep_journal(self, step: int) -> None:
        """Have the journal up to a checkpoint here, for whoever sends it to MLflow: it comes from the store."""
        try:
            state = load_state(self.store, self.run_name, step)
            Journal(self.folder / JOURNAL).roll_back(checkpoint_file(self.store, state, JOURNAL))
            commit(self.folder, step)
        except StoreError as error:
            log.warning("The journal up to step %d is not here yet: %s", step, error)

    @property
    def reasons(self) -> frozenset[str]:
        """What ranks said of why, whichever of them did."""
        return frozenset(_last_line(one["message"]) for one in self.reports)

    @property
    def why(self) -> str:
        """Why it failed, in a line."""
        lines = [f"rank {one['rank']} on {one['host']}: {_last_line(one['message'])}" for one in self.reports]
        return f"{'; '.join(lines or [_last_line(str(self.failure))])[:1000].rstrip('.')}."


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[-1].strip()[:500]
