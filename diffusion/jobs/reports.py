"""What a rank says: its lines, how far it is, and the error that ended it."""

from __future__ import annotations

import contextlib
import io
import json
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from diffusion import errors
from diffusion.trust.redaction import fit_to_leave

ERROR = "error.json"


class RankOutput(io.TextIOBase):
    """Writes whole lines, each with a prefix and fit to leave: several ranks share one log."""

    def __init__(self, prefix: str, output: TextIO) -> None:
        self._prefix, self._output, self._line = prefix, output, ""

    def write(self, text: str) -> int:
        """Keep the text until its line is whole."""
        *whole, self._line = (self._line + text).split("\n")
        if whole:
            with contextlib.suppress(OSError):  # a full disk: what is said there is not worth the job
                self._output.write("".join(f"{self._prefix}{fit_to_leave(line)}\n" for line in whole))
                self._output.flush()
        return len(text)


class ProgressFile:
    """What a job has done so far, in its folder's `progress.json`, for whoever watches it from outside."""

    NAME = "progress.json"
    SECONDS = 0.5

    def __init__(self, folder: Path, active: bool) -> None:
        self._path, self._active, self._written = folder / self.NAME, active, 0.0

    def write(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say where the job is; at most twice a second, but never missing the end of a stage."""
        now = time.monotonic()
        if self._active and (done == total or now - self._written >= self.SECONDS):
            self._written = now
            part = self._path.with_suffix(".part")
            with contextlib.suppress(OSError):  # a full disk: neither is this
                part.write_text(
                    json.dumps({"stage": stage, "done": done, "total": total, "note": note}), encoding="utf-8"
                )
                part.replace(self._path)


def report_of(error: Exception, rank: int) -> dict[str, Any]:
    """What a rank leaves of the error that ended it: {"kind", "message", "rank"}."""
    kind = type(error).__name__ if isinstance(error, errors.UserError) else "crash"
    message = str(error) if kind != "crash" else fit_to_leave("".join(traceback.format_exception(error)))
    return {"kind": kind, "message": message, "rank": rank}


def error_of(folder: Path) -> Exception | None:
    """The error that a job left in its folder, as the exception that it was; None if it left none."""
    path = folder / ERROR
    if not path.exists():
        return None
    return error_from(json.loads(path.read_text(encoding="utf-8")))


def error_from(report: dict[str, Any]) -> Exception:
    """The error that a rank has reported, as the exception that it was."""
    kind = getattr(errors, report["kind"], None)
    if isinstance(kind, type) and issubclass(kind, errors.UserError):
        return kind(report["message"])
    return RuntimeError(f"rank {report['rank']} failed:\n{report['message']}")
