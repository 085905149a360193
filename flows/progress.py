"""Progress for people: a bar with the time left on a terminal, plain lines elsewhere, one artifact a run in the Prefect UI."""

from __future__ import annotations

import functools
import sys
import time
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Column

from diffusion.trust.redaction import fit_to_leave
from flows.course import course, duration

LINE_SECONDS, LATER_SECONDS = 10.0, 60.0
"""Between two lines of a stage: in its first minutes, and after them."""
FIRST_SECONDS = 120.0
PAGE = "report"
"""The artifact of a run: its description says how far the run is, its page shows what there is to see, and at the end the report."""
_pages: dict[UUID, UUID] = {}
"""Their ids, by flow run."""


class Phase:
    """One stage of the flow. Use it as a context, and call `update` as often as is convenient.

    Args:
        name: what is being done, for people.
        key: its place in the course of the run.
    """

    def __init__(self, name: str, key: str) -> None:
        self.name, self._key = f"{course.number(key)}{name}", key
        self._bar: Progress | None = None
        self._last_line = 0.0
        self._first: tuple[float, float] | None = None  # when the first figure came, and what share was done then

    def __enter__(self) -> Phase:
        course.enter(self._key)
        if attended() and sys.stderr.isatty():
            # On a narrow terminal the note gives way, never the time that is left.
            self._bar = Progress(
                SpinnerColumn(),  # it moves, whatever is waited for
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=34)),
                BarColumn(bar_width=8),
                TaskProgressColumn(),
                TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True, min_width=18)),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=Console(stderr=True),
                expand=True,
            )
            self._bar_task = self._bar.add_task(self.name, total=None, note="", left="")
            self._bar.start()
        else:
            say(self.name)
        return self

    def update(self, done: int, total: int | None, note: str = "") -> None:
        """Say how far the stage is, in units of its own."""
        now = time.monotonic()
        share = done / total if total else 0.0
        if self._first is None:  # a stage that goes on where another stopped does not begin at zero
            self._first = now, share
        course.advance(share)
        left = self._left(now, share)
        if self._bar is not None:
            self._bar.update(self._bar_task, completed=done, total=total, note=note, left=left)
        if now - self._last_line < (LINE_SECONDS if now - self._first[0] < FIRST_SECONDS else LATER_SECONDS):
            return
        if self._last_line:
            left = f", {left}" if left else ""
            if self._bar is None:
                say(f"{self.name}: {share:.0%}{left}" + (f" ({note})" if note else ""))
            show(f"{left.removeprefix(', ') + ': ' if left else ''}{self.name}, {share:.0%}")  # cards cut it
        self._last_line = now

    def _left(self, now: float, share: float) -> str:
        """Of the whole run, once its speed is known; else of this stage."""
        whole = course.left(share)
        if whole is not None:
            return f"{duration(whole)} left in all"
        assert self._first is not None
        since, before = self._first
        return f"{duration((now - since) * (1 - share) / (share - before))} left here" if share > before else ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None:
                self._bar.update(self._bar_task, completed=1, total=1)
            self._bar.stop()
        if kind is None:
            course.leave()


def show(description: str, page: str | None = None) -> None:
    """Say in the run's artifact how far it is, and what there is to see, as Markdown; without `page` that stays as it is."""
    run = UUID(str(runtime.flow_run.id))
    shown: dict[str, Any] = {"description": fit_to_leave(description)} | ({"data": page} if page else {})
    try:
        with get_client(sync_client=True) as client:
            if run not in _pages:  # a retry goes on with that of the first try
                its = ArtifactFilter(
                    flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[PAGE])
                )
                for found in client.read_artifacts(artifact_filter=its):
                    _pages[run] = found.id
            if run in _pages:
                client.update_artifact(_pages[run], ArtifactUpdate(**shown))
            else:
                begun: dict[str, Any] = {
                    "key": PAGE,
                    "type": "markdown",
                    "flow_run_id": run,
                    "data": "There is nothing to see yet.",
                }
                _pages[run] = client.create_artifact(ArtifactCreate(**begun | shown)).id
    except Exception as error:  # no trouble of the Prefect server's is a reason to end what is being shown
        say(f"Prefect does not take the progress ({type(error).__name__}).")


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
