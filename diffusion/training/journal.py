"""The journal: what happened in a run, one JSON line a record, without a clock: two honest runs write the same bytes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from diffusion.trust.reading import parse_json

log = logging.getLogger(__name__)

JOURNAL, TIMING = "journal.jsonl", "timing.jsonl"
COMMITTED = "committed.json"
"""The step of the newest checkpoint that is safely in the store: the journal up to there is final."""

LOG_SNR_BIN_EDGES = tuple(range(-10, 11, 2))
"""Bins of the records' `loss_by_log_snr`; the outer two reach to infinity."""


class Journal:
    """A file of JSON lines that only grows, except when it is rolled back to a checkpoint.

    A disk that takes no more for a while ends nothing: what is missing in the file is kept, and written with the next record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._content = bytearray(path.read_bytes())
        self._written = len(self._content)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns, or that it is not has been said."""
        self._content += json.dumps(record).encode() + b"\n"
        try:
            with self.path.open("r+b") as file:
                file.seek(self._written)
                file.write(self._content[self._written :])
                file.truncate()
        except OSError as error:
            log.error("%s can't be written (%s): its records are kept for later.", self.path, error.strerror)
        else:
            self._written = len(self._content)

    def read(self) -> bytes:
        """Everything so far."""
        return bytes(self._content)

    def roll_back(self, content: bytes) -> None:
        """Replace all of it by what a checkpoint kept."""
        part = self.path.with_suffix(".part")
        part.write_bytes(content)
        part.replace(self.path)
        self._content, self._written = bytearray(content), len(content)

    def drop_after(self, step: int) -> None:
        """Drop the records that lie after `step`, and a last line that was cut off."""
        kept = [json.dumps(record) + "\n" for record in records(self.read()) if record["step"] <= step]
        self.roll_back("".join(kept).encode())


def records(content: bytes) -> list[dict[str, Any]]:
    """The records of a journal's bytes. A last line without its end was never written, and does not count; nor does one that
    can't be read, as a power cut leaves them: a checkpoint has its own copy, with a digest."""
    whole, newline, _ = content.rpartition(b"\n")
    found = [_record(line) for line in whole.split(b"\n")] if newline else []
    if None in found:
        log.warning("%d lines of a journal can't be read: they are left out.", found.count(None))
    return [record for record in found if record is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def committed_step(folder: Path) -> int:
    """The step of the newest checkpoint that is safely in the store, as a run's folder knows it; 0 for none, or none readable."""
    try:
        record = _record((folder / COMMITTED).read_bytes())
    except FileNotFoundError:
        return 0
    return int(record["step"]) if record else 0


def commit(folder: Path, step: int) -> None:
    """Note that the journal is final up to a step: its checkpoint is safely in the store."""
    part = folder / f"{COMMITTED}.part"
    part.write_text(json.dumps({"step": step}), encoding="utf-8")
    part.replace(folder / COMMITTED)
