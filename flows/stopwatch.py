"""How long the parts of a flow run took, so that its own share can be told from that of the work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Stopwatch:
    """Seconds by part. What no part accounts for, since the process began, is the flow's own."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._process_start = psutil.Process().create_time()

    def add(self, part: str, seconds: float) -> None:
        """Count seconds to a part."""
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within to a part."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start)

    def parts(self) -> dict[str, float]:
        """Seconds by part, the flow's own last, and all of them together."""
        total = time.time() - self._process_start
        return {**self._seconds, "flow's own": total - sum(self._seconds.values()), "total": total}


stopwatch = Stopwatch()
"""Of this process: a flow run has a process to itself."""
