"""A copy of the project in a fresh folder with the servers of `make up`, for tests that act on it as a user or a fault would."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tests.conftest import BIN, free_port, lay_out
from tests.processes import family

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Project:
    """A copy of the project in a fresh folder with its servers up, and a shell in which only the environment is active."""

    folder: Path
    env: dict[str, str]
    printed: str
    arguments: set[str] = field(default_factory=set)
    """Of processes: what others could see while `stack` and `watched` ran."""

    def shell(
        self, *command: str, folder: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=folder or self.folder, env=self.env | (env or {}), capture_output=True, text=True
        )

    @property
    def servers(self) -> dict[str, str]:
        """The environment of a client of the servers."""
        return dict(json.loads((self.folder / "var/stack/servers.json").read_text()))

    def stack(self, verb: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.watched("infra/stack.py", verb, **env)

    def watched(self, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A script of the project, while the arguments of all that it starts are looked at, as any user of the machine can."""
        ended, own = threading.Event(), psutil.Process()

        def look() -> None:
            while not ended.wait(0.2):
                for process in family(own):
                    with contextlib.suppress(psutil.Error):
                        self.arguments.add("\0".join(process.cmdline()))

        looking = threading.Thread(target=look)
        looking.start()
        try:
            return self.shell(sys.executable, script, *words, env=env)
        finally:
            ended.set()
            looking.join()


def copy_project(folder: Path, archive: Path) -> None:
    """A copy of the project that uses this environment, with the archive where the generated one is looked for."""
    folder.mkdir(exist_ok=True)
    locks = (path.name for path in PROJECT.glob("requirements*.lock"))
    for name in ("flows", "infra", "mlflow", "prefect.yaml", "pyproject.toml", "Makefile", *locks):
        source = PROJECT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
            # Older than the environment, or `make` would install this copy in it, in place of the project.
            os.utime(folder / name, (0, 0))
    # No night begins while tests run.
    deployments, far = folder / "prefect.yaml", (datetime.now(UTC).hour + 12) % 24
    deployments.write_text(re.sub(r"(cron: 0) \d+ ", rf"\1 {far} ", deployments.read_text()))
    os.utime(deployments, (0, 0))
    (folder / ".venv").symlink_to(BIN.parent)
    lay_out(folder / "var", archive)


@contextmanager
def running_project(parent: Path, archive: Path, **environment: str) -> Iterator[Project]:
    """Bring the stack up in a folder of its own, with the archive where the generated one is looked for."""
    folder = parent / "project"
    copy_project(folder, archive)
    home = folder.parent / "home"
    home.mkdir()
    env = {
        "HOME": str(home),
        "PATH": f"{BIN}{os.pathsep}/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",  # as in conftest.py
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # a minute is long to wait for a night that was moved
        "PREFECT_PORT": str(free_port()),
        "MLFLOW_PORT": str(free_port()),
        **environment,
    }
    made = Project(folder, env, "")
    try:
        up = made.stack("up")
        assert up.returncode == 0, up.stdout + up.stderr
        for port in ("PREFECT_PORT", "MLFLOW_PORT"):
            del env[port]  # a fresh shell knows nothing of them
        yield Project(folder, env, up.stdout, made.arguments)
    finally:
        made.stack("down")
