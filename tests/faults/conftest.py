"""What tests that kill share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import pytest

from tests.faults.report import Kill


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[list[Kill]], None]:
    """Puts kills, with what came of them, on the table."""
    return lambda kills: record_property("kills", json.dumps([asdict(kill) for kill in kills]))
