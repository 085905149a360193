"""The journal: what happened in a run, one JSON line a record, without a clock: two honest runs write the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JOURNAL, TIMING = "journal.jsonl", "timing.jsonl"
COMMITTED = "committed.json"
"""The step of the newest checkpoint that is safely in the store: the journal up to there is final."""

LOG_SNR_BIN_EDGES = tuple(range(-10, 11, 2))
"""Bins of the records' `loss_by_log_snr`; the outer two reach to infinity."""


class Journal:
    """A file of JSON lines that only grows, except when it is rolled back to a checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> bytes:
        """Everything so far."""
        return self.path.read_bytes()

    def roll_back(self, content: bytes) -> None:
        """Replace all of it by what a checkpoint kept."""
        part = self.path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(self.path)


def drop_after(path: Path, step: int) -> None:
    """Drop the records of a journal that lie after `step`, and a last line that was cut off."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in records(path.read_bytes()) if record["step"] <= step]
        Journal(path).roll_back("".join(kept).encode())


def records(content: bytes) -> list[dict[str, Any]]:
    """The records of a journal's bytes. A last line without its end was never written and does not count."""
    whole, newline, _ = content.rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines()] if newline else []


def committed_step(folder: Path) -> int:
    """The step of the newest checkpoint that is safely in the store, as a run's folder knows it; 0 for none."""
    path = folder / COMMITTED
    return int(json.loads(path.read_text())["step"]) if path.exists() else 0


def commit(folder: Path, step: int) -> None:
    """Note that the journal is final up to a step: its checkpoint is safely in the store."""
    part = folder / f"{COMMITTED}.part"
    part.write_text(json.dumps({"step": step}))
    part.replace(folder / COMMITTED)
