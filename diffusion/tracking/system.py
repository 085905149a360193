"""What the machine does meanwhile: CPU, memory, disk and GPUs, as MLflow samples them, sent by our own patient sender."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

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
SHOWN = (
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "disk_usage_percentage",
)

log = logging.getLogger(__name__)


class SystemMetrics:
    """A thread that logs `system/…` metrics of this machine; use it as a context. It never raises, and hardly waits for MLflow.

    MLflow's own monitor ends for good with the first call that fails; this one keeps its points until they are taken.
    """

    def __init__(self, run: TrackedRun, sample_seconds: float = SAMPLE_SECONDS) -> None:
        self.run, self.sample_seconds = run, sample_seconds
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
        psutil.cpu_percent()  # the first answer is 0
        monitors = _monitors()
        while not self._stop.is_set():
            try:
                self._sample(monitors)
                self.run.log_metrics(self._rows, milliseconds_a_step=1000)
                self._rows = []
            except Exception as error:  # whatever MLflow's or a driver's trouble is, it is no reason to end
                log.info("no system metrics for a moment (%s)", type(error).__name__)
                self._rows = self._rows[-KEPT_POINTS * len(SHOWN) :]

    def _sample(self, monitors: list[Any]) -> None:
        """Look at the machine for a while, and add one point."""
        for _ in range(SAMPLES):
            if self._stop.wait(self.sample_seconds):
                break
            for monitor in monitors:
                monitor.collect_metrics()
        second = int(time.time() - self.run.started / 1000)
        for monitor in monitors:
            averaged = monitor.aggregate_metrics()
            self._rows += [
                (f"system/{name}", float(value), second)
                for name, value in averaged.items()
                if name in SHOWN or name.startswith("gpu")
            ]
            monitor.clear_metrics()


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
