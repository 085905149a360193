"""The table of what was killed."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path


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


def write_report(kills: list[Kill], seed: int) -> None:
    """Print the table, and write every kill to the file that SOAK_REPORT names."""
    groups: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        groups[kill.victim].append(kill)
    print(
        f"\nseed {seed}, {len(kills)} kills\n| killed | times | tree gone after (s, most) | going on after (s, most) | identical |"
    )
    print("| --- | --- | --- | --- | --- |")
    for victim, own in sorted(groups.items()):
        gone, recovered = max(k.gone_seconds for k in own), max(k.recovered_seconds for k in own)
        print(f"| {victim} | {len(own)} | {gone} | {recovered} | {'yes' if all(k.identical for k in own) else 'NO'} |")
    if path := os.environ.get("SOAK_REPORT"):
        Path(path).write_text(json.dumps({"seed": seed, "kills": [asdict(kill) for kill in kills]}, indent=1) + "\n")
