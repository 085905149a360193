"""The sender: fills the MLflow run from the journal, in the background, each point once.

Only what lies behind a safely stored checkpoint is sent: a resumed training may repeat what came after it, but never
changes what was sent. The points' times make repetition harmless (see `TrackedRun.log_metrics`), so a restarted sender
begins at the beginning.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from diffusion.tracking.connection import when_it_answers
from diffusion.tracking.run import TrackedRun
from diffusion.training.journal import JOURNAL, TIMING, committed_step, records
from diffusion.trust.redaction import first_line

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
RETRY_SECONDS = 5.0


class MetricsSender:
    """A thread that sends what is committed; use it as a context. `flush` waits until all is sent."""

    def __init__(self, run: TrackedRun, folder: Path) -> None:
        self.run, self.folder = run, folder
        self._sent = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name="metrics-sender", daemon=True)

    def __enter__(self) -> MetricsSender:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        try:  # once more, for what a failed or cancelled training has left
            self.send_committed()
        except Exception as error:
            log.warning("MLflow did not take the last metrics (%s).", first_line(error))

    def _loop(self) -> None:
        while not self._stop.is_set():
            wait = POLL_SECONDS
            try:
                self.send_committed()
            except Exception as error:  # whatever the server's trouble is, training must not notice
                log.warning(
                    "MLflow does not take the metrics (%s); trying again in %.0f s.", first_line(error), RETRY_SECONDS
                )
                wait = RETRY_SECONDS
            self._stop.wait(wait)

    def send_committed(self) -> None:
        """Send what was committed since the last call. Raises what the client raises; nothing is lost then."""
        with self._lock:
            committed = committed_step(self.folder)
            if committed <= self._sent:
                return
            rows: list[tuple[str, float, int]] = []
            for name, convert in ((JOURNAL, journal_rows), (TIMING, timing_rows)):
                path = self.folder / name
                # Timing is only here: a run that goes on on another machine has none of what was before.
                for record in records(path.read_bytes() if path.exists() else b""):
                    if self._sent < record["step"] <= committed:
                        rows += convert(record)
            self.run.log_metrics(rows)
            self._sent = committed

    def flush(self) -> None:
        """Send all that is committed, however long the server takes to come back. Raises TrackingError after ten minutes."""
        when_it_answers(self.send_committed)


def journal_rows(record: dict[str, Any]) -> list[tuple[str, float, int]]:
    """The (name, value, step) rows of a record of the journal."""
    keys = ("loss", "learning_rate", "gradient_norm") if record["kind"] == "metrics" else ()
    return [(f"train/{key}", record[key], record["step"]) for key in keys]


def timing_rows(record: dict[str, Any]) -> list[tuple[str, float, int]]:
    """The (name, value, step) rows of a record of the timing."""
    keys = ("images_per_second", "model_flops_utilisation", "data_wait_share")  # earlier versions had not all
    rows = [(f"speed/{key}", record[key], record["step"]) for key in keys if key in record]
    return [*rows, ("speed/peak_memory_mib", record["peak_memory_bytes"] / 2**20, record["step"])]
