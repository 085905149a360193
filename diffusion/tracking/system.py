"""What the machines do meanwhile: CPU, memory, disk and GPUs, as MLflow samples them, sent by our own patient sender.

On a cluster they are those of its workers, by host. A worker looks at its host (`Machine`), what it saw comes to a file of the
job's folder on the flow's machine, and is averaged there like what that machine sees of itself.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil

if TYPE_CHECKING:
    from diffusion.tracking.run import TrackedRun

SAMPLE_SECONDS = 10.0
SAMPLES = 6
"""Averaged into one point: one a minute, or a night's metrics would be mostly these."""
LAST_SECONDS = 2.0
"""That the end of a run waits for the last point."""
KEPT_POINTS = 24 * 60
"""While MLflow is away."""
HOSTS = "hosts.json"
"""Of a job's folder: what the hosts that run it do, newest, as {host: {metric: value}}."""
FRESH_SECONDS = 60.0
"""From then on it is of a job that has ended."""
SHOWN = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
)

log = logging.getLogger(__name__)


class Watched(Protocol):
    """What can be asked what machines do."""

    def look(self) -> Mapping[str, float]:
        """Metrics by name; none where there is nothing to be seen."""
        ...


class Machine:
    """This machine."""

    def __init__(self) -> None:
        psutil.cpu_percent()  # the first answer is 0
        self._monitors = _monitors()

    def look(self) -> Mapping[str, float]:
        """Its metrics, by MLflow's names."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= {name: float(value) for name, value in monitor.aggregate_metrics().items() if _is_shown(name)}
            monitor.clear_metrics()
        return found


class Hosts:
    """The hosts of the job that runs now; `folder` is the run's, in which each job has its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def look(self) -> Mapping[str, float]:
        """Their metrics as `host/name`."""
        files = [path for path in (self._folder / HOSTS, *self._folder.glob(f"*/{HOSTS}")) if path.exists()]
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None or time.time() - newest.stat().st_mtime > FRESH_SECONDS:
            return {}
        hosts: dict[str, dict[str, float]] = json.loads(newest.read_text(encoding="utf-8"))
        return {f"{host}/{name}": value for host, seen in hosts.items() for name, value in seen.items()}


def _is_shown(name: str) -> bool:
    return name in SHOWN or name.startswith("gpu")


class SystemMetrics:
    """A thread that logs `system/…` metrics; use it as a context. It never raises, and hardly waits for MLflow.

    MLflow's own monitor ends for good with the first call that fails; this one keeps its points until they are taken.

    Args:
        source: makes what is asked, in the thread: MLflow's monitors take long to import.
    """

    def __init__(
        self, run: TrackedRun, source: Callable[[], Watched] = Machine, sample_seconds: float = SAMPLE_SECONDS
    ) -> None:
        self.run, self.source, self.sample_seconds = run, source, sample_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)
        self._rows: list[tuple[str, float, int]] = []

    def __enter__(self) -> SystemMetrics:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LAST_SECONDS)

    def _loop(self) -> None:
        source = self.source()
        while not self._stop.is_set():
            try:
                self._sample(source)
                self.run.log_metrics(self._rows, milliseconds_a_step=1000)
                self._rows = []
            except Exception as error:  # whatever MLflow's or a driver's trouble is, it is no reason to end
                log.info("no system metrics for a moment (%s)", type(error).__name__)
                self._rows = self._rows[-KEPT_POINTS * len(SHOWN) :]

    def _sample(self, source: Watched) -> None:
        """Look for a while, and add one point."""
        seen: dict[str, list[float]] = {}
        for _ in range(SAMPLES):
            ended = self._stop.wait(self.sample_seconds)
            for name, value in source.look().items():
                seen.setdefault(name, []).append(value)
            if ended:
                break
        second = int(time.time() - self.run.started / 1000)
        self._rows += [(f"system/{name}", sum(values) / len(values), second) for name, values in seen.items()]


def _monitors():  # type: ignore[no-untyped-def]  # MLflow's classes are imported late
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor

    monitors = [CPUMonitor(), DiskMonitor()]
    try:
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        monitors.append(GPUMonitor())
    except Exception as error:  # MLflow raises various errors where there is no GPU, driver or package
        log.info("No GPU metrics: %s", error)
    return monitors
