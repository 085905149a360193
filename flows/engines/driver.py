"""The driver of a job on a Ray cluster: starts its ranks in workers there, and them again when a host or a rank is lost.

    python -m flows.engines.driver FOLDER      run the job of FOLDER (job.json, placement.json)
    python -m flows.engines.driver capacity    say what the cluster has

The flow runs it as a process of its own, like a rank of this machine: what it says, its progress and its error lie in the folder,
and SIGTERM ends it, on which the training leaves a checkpoint. RAY_ADDRESS names the cluster; this machine is one of its nodes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

import diffusion
import flows
from diffusion.errors import ClusterError, StoreError
from diffusion.jobs.lock import lock_folder
from diffusion.jobs.reports import ERROR, RankOutput, error_from, report_of
from diffusion.jobs.specs import SPEC
from diffusion.jobs.stopping import StopRequest, end_with_parent
from diffusion.store import layout
from diffusion.store.objects import open_store
from diffusion.training.journal import committed_step
from diffusion.trust.private import put
from diffusion.trust.redaction import first_line, redact_logs
from flows.engines.attempt import POLL_SECONDS, Attempt, capacity, growth, reserve
from flows.engines.cores import computing_variables
from flows.engines.placement import PLACEMENT, Placement

PACKAGES = [str(Path(package.__path__[0]).resolve()) for package in (diffusion, flows)]
"""What workers get from here: the code that the flow has, whatever lies on their hosts."""
ANSWER_SECONDS = 10.0
GROW_SECONDS, HELD_SECONDS = 5.0, 600.0
"""Between two looks for more room; and from a start for more that came to nothing to the next one."""
MOST_LOSSES = 5

log = logging.getLogger(__name__)


@contextmanager
def connected(threads: int | None = None) -> Iterator[None]:
    """A connection to the cluster. Raises ClusterError with what to do."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    variables = computing_variables(threads or 1) | {"PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        ray.init(
            address=address,
            runtime_env={"py_modules": PACKAGES, "env_vars": variables} if threads else None,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # of many kinds
        raise ClusterError(
            f"The Ray cluster at {address} can't be used: {first_line(error)}. Start one (ray start --head) with this machine "
            f"as one of its hosts, Ray {ray.__version__} and Python {sys.version_info.major}.{sys.version_info.minor} on all of "
            "them, name it in RAY_ADDRESS as host:6379, and set RAY_AUTH_MODE and RAY_AUTH_TOKEN as it has them."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run(folder: Path, stop: StopRequest) -> bool:
    """Run the folder's job; returns whether it came to its end, and was not asked to stop. Raises what it failed with."""
    placement = Placement.model_validate_json((folder / PLACEMENT).read_bytes())
    spec = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    store, marker = open_store(spec["store"]), layout.marker(spec["run"], uuid.uuid4().hex)
    store.write(marker, b"")
    try:
        losses, last = 0, (0, frozenset[str]())
        wanted, grow_from = 0, 0.0
        while (place := reserve(placement, stop)) is not None:
            if place.workers < wanted:  # what is free is not where a worker has room
                grow_from = time.monotonic() + HELD_SECONDS
            attempt = Attempt(folder, placement, store, marker, place, stop)
            try:
                grown = follow(attempt, placement, stop, grow_from)
            finally:
                attempt.end()
            wanted = place.workers + 1 if grown else 0
            for report in attempt.reports:
                error = error_from(report)
                if isinstance(error, StoreError):  # other hosts may reach it
                    raise StoreError(f"{error} (on {report['host']})")
                if not isinstance(error, RuntimeError):
                    raise error
            if stop.is_made():
                return False
            if attempt.failure is None and not grown:
                return True
            if attempt.failure is not None:
                losses += 1
                # A loss names ports or processes. What ends two starts in a row alike, at the same step, is none.
                before, last = last, (committed_step(folder), attempt.reasons)
                if attempt.reports and last[0] == before[0] and last[1] & before[1]:
                    raise error_from(attempt.reports[0])
                if losses > MOST_LOSSES:
                    raise RuntimeError(f"The job was begun {losses} times, and lost workers each time: {attempt.why}")
                print(
                    f"Lost: {attempt.why} Going on from the newest checkpoint ({losses} of {MOST_LOSSES} times).",
                    flush=True,
                )
        return False
    finally:
        try:
            store.delete(marker)
        except StoreError as error:  # what the job ended with matters more
            log.warning("The marker %s was not deleted: %s", marker, error)


def follow(attempt: Attempt, placement: Placement, stop: StopRequest, grow_from: float) -> bool:
    """Wait for the end of an attempt; returns whether it was ended because more workers can have a part in it.

    Args:
        grow_from: the time, as `time.monotonic` has it, from which on room for more is looked for.
    """
    grown, looked = False, max(time.monotonic(), grow_from)
    while not attempt.wait(POLL_SECONDS):
        attempt.collect()
        if stop.is_made() and not attempt.listens:
            return False
        if stop.is_made():
            attempt.ask_to_stop()
        elif not grown and attempt.listens and placement.elastic and time.monotonic() - looked > GROW_SECONDS:
            looked = time.monotonic()
            more = growth(placement, attempt.place.workers)
            if more:
                grown = True
                print(
                    f"There is more room: going on with {more} processes in place of {attempt.place.workers}.",
                    flush=True,
                )
                attempt.ask_to_stop()
    attempt.collect()
    return grown


def main() -> int:
    """Run the folder's job, or say what the cluster has. Returns 0; 1 with a sentence; 143 if it was asked to end."""
    end_with_parent()
    os.umask(0o077)
    redact_logs()
    sys.stdout = sys.stderr = RankOutput("", sys.stdout)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout)
    if sys.argv[1] == "capacity":
        try:
            with connected():
                print(capacity().model_dump_json(), flush=True)
        except ClusterError as error:
            print(f"error: {error}", flush=True)
            return 1
        return 0
    folder, stop = Path(sys.argv[1]), StopRequest()
    try:
        placement = Placement.model_validate_json((folder / PLACEMENT).read_bytes())
        with lock_folder(folder), connected(placement.threads):
            stop.take_signal()  # Ray's own handler ends the process at once, and with it the ranks
            return 0 if run(folder, stop) else 128 + signal.SIGTERM
    except Exception as error:
        put(folder / ERROR, json.dumps(report_of(error, 0)).encode(), Path.replace)
        log.exception("the job failed")
        return 1


if __name__ == "__main__":
    sys.exit(main())
