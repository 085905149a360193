"""Progress for people: a bar with the time left on a terminal, plain lines elsewhere, an artifact in the Prefect UI."""

from __future__ import annotations

import functools
import sys
import time
from types import TracebackType
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from diffusion.trust.redaction import fit_to_leave

LINE_SECONDS = 10.0


class Stage:
    """One stage of the flow. Use it as a context, and call `update` as often as is convenient.

    Args:
        name: what is being done, for people.
        key: key of the artifact: lowercase letters, digits, dashes.
    """

    def __init__(self, name: str, key: str) -> None:
        self.name, self._key = name, key
        self._bar: Progress | None = None
        self._artifact: UUID | None = None
        self._last_line = 0.0
        self._first: tuple[float, float] | None = None  # when the first figure came, and what share was done then

    def __enter__(self) -> Stage:
        if attended() and sys.stderr.isatty():
            # On a narrow terminal the note gives way, never the time that is left.
            self._bar = Progress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=26)),
                BarColumn(bar_width=12),
                TaskProgressColumn(),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=Console(stderr=True),
                expand=True,
            )
            self._bar_task = self._bar.add_task(self.name, total=None, note="")
            self._bar.start()
        else:
            say(self.name)
        return self

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Say how far the stage is, in units of its own."""
        if self._bar is not None:
            if self._first is None and done:
                self._bar.reset(self._bar_task, completed=done, total=total)
            self._bar.update(self._bar_task, completed=done, total=total, note=note)
        now = time.monotonic()
        share = done / total if total else 0.0
        if self._first is None:  # a stage that goes on where another stopped does not begin at zero
            self._first = now, share
        if now - self._last_line < LINE_SECONDS:
            return
        if self._last_line:
            since, before = self._first
            left = f", about {(now - since) * (1 - share) / (share - before):.0f} s left" if share > before else ""
            if self._bar is None:
                say(f"{self.name}: {share:.0%}{left}" + (f" ({note})" if note else ""))
            self._show(100 * share, f"{note}{left}")
        self._last_line = now

    def _show(self, percent: float, note: str) -> None:
        try:
            if self._artifact is None:
                made = create_progress_artifact(percent, key=self._key, description=self.name)
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, percent, description=f"{self.name}. {note}")
        except Exception as error:  # no trouble of the Prefect server's is a reason to end what is being shown
            say(f"Prefect does not take the progress ({type(error).__name__}).")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._bar_task, completed=1, total=1)
            self._bar.stop()
        if self._artifact is not None and kind is None:
            self._show(100.0, "Done")


def say(line: str) -> None:
    """One line for whoever watches: on the console of a run by hand, in the log of a deployed one."""
    line = fit_to_leave(line)
    if attended():
        print(line, file=sys.stderr, flush=True)
    else:
        get_run_logger().info(line)


def attended() -> bool:
    """Whether the flow was started by hand in this process, not by a worker."""
    return _deployment(runtime.flow_run.id) is None


@functools.lru_cache(maxsize=1)
def _deployment(flow_run: str | None) -> str | None:
    """The deployment of this flow run: asked of the server, where there is none each time anew, for a tenth of a second."""
    return runtime.deployment.id
