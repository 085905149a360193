"""Which code this is: the commit that runs and models are tagged with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from diffusion.settings import settings
from diffusion.trust.redaction import shown

PROJECT = Path(__file__).resolve().parent.parent
UNKNOWN = "unknown"


class Code(NamedTuple):
    """The code of this process, and of jobs that start now."""

    commit: str
    """Of git, with `-dirty` if files differ from it; or UNKNOWN."""
    why: str
    """Why it is unknown; empty where it is not."""


def git_commit() -> str:
    """The commit of the code: see `Code`."""
    return this_code().commit


def this_code(project: Path = PROJECT) -> Code:
    """The code in the project's folder. TRAIN_DIFFUSION_COMMIT names it where there is no repository."""
    given = settings().commit
    if given and given != UNKNOWN:  # as images are built where nobody names it
        return Code(given, "")
    try:
        # A repository around it, of which this folder is no part, says nothing of it.
        _git(project, "ls-files", "--error-unmatch", "pyproject.toml")
        commit = _git(project, "rev-parse", "HEAD")
        dirty = _git(project, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except FileNotFoundError:
        return Code(UNKNOWN, "git is not installed")
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Code(UNKNOWN, shown(said[0] if said else type(error).__name__, 200))
    return Code(f"{commit}-dirty" if dirty else commit, "")


def _git(project: Path, *arguments: str) -> str:
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(project),
        *arguments,
    ]  # beside a git of the user's, which it would hinder
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
