"""Write the lock files from constraints.txt: `make lock`. Each line is a package at its pinned version, with the sha256 of its wheels.

requirements.lock is what a user installs, requirements-torch.lock torch as PyPI has it, with the CUDA libraries that its Linux
wheels need, requirements-torch-cpu.lock its build without them, requirements-ray.lock what jobs on a cluster need besides, and
requirements-dev.lock what tests and linters do.
uv resolves them for all platforms from Python 3.11 on. Source distributions stay out: installing one runs its code.
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
WITH_TORCH = ("torch", "triton", "nvidia-", "cuda-")
NOT_WITH_TORCH = ("nvidia-ml-py",)
BUILD = "setuptools"
"""The build back end, with which the project itself is installed."""
CPU_BUILD = "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"
"""Of torch, without CUDA, for Python 3.11 on x86-64 Linux: what the tests run with. PyPI does not have it."""
HEADER = "# Made by make lock. pip install --require-hashes --only-binary :all: --no-deps -r {}\n"


def resolve(*extras: str) -> dict[str, dict[str, Any]]:
    """The packages that the project with these extras needs, by name, each as a lock file describes it."""
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder, "pylock.toml")
        command = [sys.executable, "-m", "uv", "--no-config", "pip", "compile", "-", "pyproject.toml", "-o", str(lock)]
        command += ["-c", "constraints.txt", "--universal", "--python-version", PYTHON, "--no-build", "--quiet"]
        command += ["--format", "pylock.toml", *(f"--extra={extra}" for extra in extras)]
        subprocess.run(command, cwd=PROJECT, check=True, text=True, input=BUILD)
        return {package["name"]: package for package in tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]}


def line_of(package: dict[str, Any]) -> str:
    """A package's line in a lock file. Ends with a sentence if it has no wheel."""
    hashes = [wheel["hashes"]["sha256"] for wheel in package.get("wheels", [])]
    if not hashes:
        raise SystemExit(f"{package['name']} {package['version']} has no wheel.")
    marker = f" ; {package['marker']}" if "marker" in package else ""
    return " ".join(
        [f"{package['name']}=={package['version']}{marker}", *(f"--hash=sha256:{one}" for one in sorted(hashes))]
    )


def main() -> None:
    """Write the files."""
    users, clusters, everybody = resolve("servers"), resolve("servers", "ray"), resolve("servers", "ray", "dev")
    torch = {name for name in everybody if name.startswith(WITH_TORCH) and name not in NOT_WITH_TORCH}
    locks = {
        "requirements.lock": users.keys() - torch,
        "requirements-ray.lock": clusters.keys() - users.keys() - torch,
        "requirements-dev.lock": everybody.keys() - clusters.keys() - torch,
        "requirements-torch.lock": torch,
    }
    written = {lock: [line_of(everybody[name]) for name in sorted(names)] for lock, names in locks.items()}
    written["requirements-torch-cpu.lock"] = [f"torch=={everybody['torch']['version']}+cpu --hash=sha256:{CPU_BUILD}"]
    for lock, lines in written.items():
        (PROJECT / lock).write_text(HEADER.format(lock) + "\n".join(lines) + "\n", encoding="utf-8")
        print(f"{lock}: {len(lines)} packages")


if __name__ == "__main__":
    main()
