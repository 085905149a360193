"""docs/architecture.md is true: the rooms import one way, and what the page names is there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs/architecture.md").read_text()
FORBIDDEN = {
    "diffusion": ("prefect", "ray", "flows"),
    "diffusion/trust": ("torch", "diffusion.data", "diffusion.process", "diffusion.model", "diffusion.training"),
    "diffusion/store": (
        "torch",
        *(
            f"diffusion.{room}"
            for room in ("data", "process", "model", "jobs", "features", "training", "evaluation", "tracking")
        ),
    ),
    "diffusion/data": (
        "torch",
        *(f"diffusion.{room}" for room in ("process", "model", "features", "training", "evaluation")),
    ),
    "diffusion/process": (
        "logging",
        "pathlib",
        "accelerate",
        "diffusion.data",
        "diffusion.model",
        "diffusion.features",
        "diffusion.training",
    ),
    "diffusion/model": (*(f"diffusion.{room}" for room in ("data", "features", "training", "evaluation", "tracking")),),
    "diffusion/training": ("mlflow", "diffusion.evaluation", "diffusion.presentation", "diffusion.tracking"),
    "diffusion/jobs": (
        "mlflow",
        "diffusion.data",
        "diffusion.model",
        "diffusion.process",
        "diffusion.training",
        "diffusion.presentation",
        "diffusion.tracking",
    ),
    "diffusion/features": (
        "mlflow",
        *(f"diffusion.{room}" for room in ("training", "evaluation", "presentation", "tracking")),
    ),
    "diffusion/evaluation": ("mlflow", "diffusion.presentation", "diffusion.tracking"),
    "diffusion/presentation": ("mlflow", "diffusion.tracking"),
    "flows/tasks": ("torch",),
}
"""Of each room, what no module of it imports."""


def imports(module: Path) -> Iterator[str]:
    """What it imports as it is loaded, or later; but for what is there for types alone."""
    tree = ast.parse(module.read_text())
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    left_out = {id(inner) for node in for_types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    found = [
        f"{module.relative_to(PROJECT)} imports {name}"
        for module in sorted((PROJECT / room).rglob("*.py"))
        for name in imports(module)
        for forbidden in FORBIDDEN[room]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert found == []


def test_what_the_page_names_is_there() -> None:
    named = re.findall(r"`((?:diffusion|flows|infra|mlflow|tests)/[\w/.]*)`", PAGE)
    assert len(named) > 30
    assert [name for name in named if not (PROJECT / name).exists()] == []


def test_text_is_utf_8_whatever_the_locale_says() -> None:
    """Recipes, cards and paths have letters that others' locales write otherwise, and another host may read them."""
    unsaid = []
    for module in (
        path for room in ("diffusion", "flows", "infra", "mlflow") for path in (PROJECT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                said = any(keyword.arg == "encoding" for keyword in node.keywords)
                if node.func.attr in ("read_text", "write_text") and not said:
                    unsaid.append(f"{module.relative_to(PROJECT)}:{node.lineno}")
    assert not unsaid
