"""The kills of all tests, on whichever worker they ran, in one table at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.faults.report import Kill, table

SEED = int(os.environ.get("SOAK_SEED", "20261124"))
"""Of the moments at which is struck."""


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[list[Kill]], None]:
    """Puts kills, with what came of them, on the table."""
    return lambda kills: record_property("kills", json.dumps([asdict(kill) for kill in kills]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write every kill to the file that SOAK_REPORT names."""
    told = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "kills" and report.when == "call"
    ]
    kills = [Kill(**kill) for text in told for kill in json.loads(str(text))]
    if kills:
        terminalreporter.write_line(f"\nseed {SEED}, {len(kills)} kills\n{table(kills)}")
        if path := os.environ.get("SOAK_REPORT"):
            Path(path).write_text(
                json.dumps({"seed": SEED, "kills": [asdict(kill) for kill in kills]}, indent=1) + "\n"
            )
