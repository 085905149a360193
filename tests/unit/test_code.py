"""Which code it is, is said as git knows it; where git doesn't, nothing is made up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flows.code import UNKNOWN, this_code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a repository of its own."""
    monkeypatch.delenv("TRAIN_DIFFUSION_COMMIT", raising=False)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, "somebody@example.org")
    folder = tmp_path / "around/project"
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("")
    commit(folder)
    return folder


def commit(folder: Path) -> str:
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True).strip()


def test_a_changed_file_is_said(project: Path) -> None:
    head = subprocess.check_output(["git", "-C", project, "rev-parse", "HEAD"], text=True).strip()
    (project / "notes.txt").touch()
    assert this_code(project) == (head, "")
    (project / "pyproject.toml").write_text("changed")
    assert this_code(project) == (f"{head}-dirty", "")


def test_the_commit_of_a_repository_around_it_is_not_its_own(project: Path) -> None:
    (project / ".git").rename(project.parent.parent / "gone")
    (project.parent / "letter.txt").touch()
    (project.parent / ".gitignore").write_text("project\n")
    commit(project.parent)
    found = this_code(project)
    assert found.commit == UNKNOWN
    assert "pyproject.toml" in found.why


def test_a_part_of_a_larger_repository_has_that_one_s_commit(project: Path) -> None:
    (project / ".git").rename(project.parent.parent / "gone")
    (project.parent / "beside.txt").touch()
    head = commit(project.parent)
    (project.parent / "beside.txt").write_text("changed, and no matter of this project")
    assert this_code(project) == (head, "")


def test_what_git_says_of_no_repository_is_passed_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / ".git").rename(project.parent.parent / "gone")
    assert this_code(project) == (UNKNOWN, this_code(project).why)
    assert "not a git repository" in this_code(project).why
    monkeypatch.setenv("PATH", str(project))
    assert this_code(project) == (UNKNOWN, "git is not installed")
    monkeypatch.setenv("TRAIN_DIFFUSION_COMMIT", "abc")
    assert this_code(project) == ("abc", "")
    monkeypatch.setenv("TRAIN_DIFFUSION_COMMIT", UNKNOWN)
    assert this_code(project).why, "an image that was built without"
