"""Which packages an environment has, and a process that has no others: a served model is loaded by a stranger's environment."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ONLY = """
import importlib.machinery, sys
class Only(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Only
"""


def brought_by(requirements: Iterable[str]) -> set[str]:
    """The distributions that pip installs for requirements: they and, as installed here, what they require in turn."""
    brought: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        one = waiting.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        brought.add(name)
        for line in importlib.metadata.requires(name) or ():
            required = Requirement(line)
            if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(required)
    return brought


def with_only(requirements: Iterable[str]) -> str:
    """Code after which a process of this environment finds no packages but those that the requirements bring."""
    brought = brought_by(requirements) | {"train-diffusion"}  # a model has a copy of its own
    tops = importlib.metadata.packages_distributions().items()
    return ONLY.format(
        hidden={top for top, owners in tops if not {canonicalize_name(owner) for owner in owners} & brought}
    )
