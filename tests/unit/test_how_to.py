"""docs/how-to.md: each of its changes is made to a copy of the project, and what stands below it runs there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SECTIONS = re.split(r"^## ", (PROJECT / "docs/how-to.md").read_text(), flags=re.MULTILINE)[1:]


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def change(copy: Path, diff: str) -> None:
    """Make a change: what it takes away must be there, once; a new file must not."""
    for file in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        names, *hunks = re.split(r"^@@\n", file, flags=re.MULTILINE)
        old, new = (line.removeprefix("+++ ") for line in names.splitlines())
        path = copy / new.removeprefix("b/")
        assert path.exists() == (old != "/dev/null"), names
        text = path.read_text() if path.exists() else ""
        for hunk in hunks:
            before, after = (
                "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] == sign) for sign in "-+"
            )
            assert text.count(before) == 1, f"{path.name} has not, or more than once:\n{before}"
            text = text.replace(before, after)
        path.write_text(text)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0].lower().replace(" ", "-"))
def test_each_change_does_what_it_says(section: str, tmp_path: Path) -> None:
    for name in ("diffusion", "flows"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    (check,) = blocks(section, "python")
    assert subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True).returncode != 0, "as it was"
    for diff in blocks(section, "diff"):
        change(tmp_path, diff)
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
