"""Tables in Markdown, of cells that somebody else may have named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head; nothing in a cell can begin another one."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
