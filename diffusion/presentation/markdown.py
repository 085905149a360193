"""Markdown for pages: tables of cells that somebody else may have named, texts as long as a database takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MOST = 5000
"""Characters of a description in MLflow's databases. SQLite alone takes longer ones."""
REST = "The rest is in `README.md`, among the version's files.\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head; nothing in a cell can begin another one."""
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (head, rule, *rows))


def _cell(text: str) -> str:
    return plain(text).replace("|", "/").replace("\n", " ")


def plain(text: str) -> str:
    """Text with names in it that somebody else has chosen: a tag, or a comment without end, hides what comes after it."""
    return text.replace("<", "&lt;")


def fit_description(card: str) -> str:
    """A card as MLflow can keep it beside a version: what is too much goes section by section, the last one first."""
    if len(card) <= MOST:
        return card
    sections = re.split(r"^(?=## )", card.replace(REST, ""), flags=re.MULTILINE)
    while len(sections) > 1 and sum(map(len, sections)) + len(REST) > MOST:
        sections.pop()
    return "".join(sections)[: MOST - len(REST)] + REST
