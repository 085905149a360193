"""The table of what was killed."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

SEED = int(os.environ.get("SOAK_SEED", "20261124"))
"""Of the moments at which is struck."""


@dataclass(frozen=True)
class Kill:
    """One kill and what came of it."""

    trial: str
    victim: str
    moment: str
    step: int
    gone_seconds: float
    """Until no process of the tree was left."""
    recovered_seconds: float = 0.0
    """From the next start until training was past where it had been."""
    identical: bool = False
    """Weights and journal to the bit, and each metric once."""


def table(kills: list[Kill]) -> str:
    """What was killed, as often as it was, with the longest of the times."""
    groups: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[kill.victim].append(kill)
    lines = [
        "| killed | times | tree gone after (s, most) | going on after (s, most) | identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    for victim, own in sorted(groups.items()):
        gone, recovered = max(k.gone_seconds for k in own), max(k.recovered_seconds for k in own)
        identical = "yes" if all(k.identical for k in own) else "NO"
        lines.append(f"| {victim} | {len(own)} | {gone} | {recovered} | {identical} |")
    return "\n".join(lines)
