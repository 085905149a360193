"""The SQLite database of the Prefect server that runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from diffusion.tracking.database import make_current


def make_prefect_current(path: Path) -> None:
    """Have it be what the installed Prefect needs, whole at every moment. Raises UserError like `make_current`."""
    make_current(path, "prefect", _upgrade)


def _upgrade(path: Path) -> None:
    """In a process of its own: Prefect reads its settings once, and this one may need others. Nothing of the caller's folder is
    imported there."""
    env = {
        **os.environ,
        "PREFECT_HOME": str(path.parent),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{path}",
        "PREFECT_PLUGINS_ENABLED": "false",
    }
    command = [sys.executable, "-P", "-m", "prefect", "server", "database", "upgrade", "-y"]
    done = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
