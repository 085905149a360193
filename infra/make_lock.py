"""Write the lock files from constraints.txt: `make lock`. Each line is a package at its pinned version, with the sha256 of its wheels.

requirements.lock is what a user installs, requirements-dev.lock what tests and linters need beside it, and
requirements-cuda.lock what torch's Linux wheels on PyPI need for GPUs. uv resolves them for all platforms from Python 3.11 on.
Source distributions stay out: installing one runs its code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
PYTHON = "3.11"
CUDA = ("nvidia-", "cuda-", "triton")
NOT_CUDA = ("nvidia-ml-py",)
BUILD = "setuptools"
"""The build back end, with which the project itself is installed."""
OTHER_BUILDS = {"torch": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"]}
"""Wheels that PyPI does not have: torch's build without CUDA for Python 3.11 on x86-64 Linux, which the tests run with."""
HEADER = "# Made by make lock. pip install --require-hashes --only-binary :all: --no-deps -r {}\n"


def resolve(*extras: str) -> dict[str, dict[str, Any]]:
    """The packages that the project with these extras needs, by name, each as a lock file describes it."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "pylock.toml")
        command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "-", "pyproject.toml", "-o", str(lock)]
        command += ["-c", "constraints.txt", "--universal", "--python-version", PYTHON, "--no-build", "--quiet"]
        command += ["--format", "pylock.toml", *(f"--extra={extra}" for extra in extras)]
        subprocess.run(command, cwd=PROJECT, check=True, text=True, input=BUILD)
        return {package["name"]: package for package in tomllib.loads(lock.read_text())["packages"]}


def line_of(package: dict[str, Any]) -> str:
    """A package's line in a lock file. Ends with a sentence if it has no wheel."""
    hashes = [wheel["hashes"]["sha256"] for wheel in package.get("wheels", [])]
    if not hashes:
        raise SystemExit(f"{package['name']} {package['version']} has no wheel.")
    marker = f" ; {package['marker']}" if "marker" in package else ""
    hashes = sorted(hashes + OTHER_BUILDS.get(package["name"], []))
    return " ".join([f"{package['name']}=={package['version']}{marker}", *(f"--hash=sha256:{one}" for one in hashes)])


def main() -> None:
    """Write the three files."""
    users, everybody = resolve("servers"), resolve("servers", "dev")
    cuda = {name for name in everybody if name.startswith(CUDA) and name not in NOT_CUDA}
    for lock, names in {
        "requirements.lock": users.keys() - cuda,
        "requirements-dev.lock": everybody.keys() - users.keys() - cuda,
        "requirements-cuda.lock": cuda,
    }.items():
        lines = [line_of(everybody[name]) for name in sorted(names)]
        (PROJECT / lock).write_text(HEADER.format(lock) + "\n".join(lines) + "\n")
        print(f"{lock}: {len(lines)} packages")


if __name__ == "__main__":
    main()
