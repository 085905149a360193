"""The SQLite database of the Prefect server that runs here."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

from diffusion.tracking.database import make_current

KEPT = Path(sys.prefix) / "share" / "train-diffusion"
"""Empty databases, beside the packages that made them, and as trusted as these."""


def make_prefect_current(path: Path) -> None:
    """Have it be what the installed Prefect needs, whole at every moment. Raises UserError like `make_current`."""
    make_current(path, "prefect", _upgrade)


def _upgrade(path: Path) -> None:
    """From nothing a hundred migrations take fifteen seconds: what they make is kept for the next one."""
    empty = KEPT / f"prefect-{version('prefect')}.db"
    with closing(sqlite3.connect(path)) as database:
        new = not database.execute("SELECT name FROM sqlite_master").fetchall()
    if new and os.access(empty, os.R_OK):
        shutil.copyfile(empty, path)
        return
    _migrate(path)
    if new:
        with suppress(OSError, sqlite3.Error):  # packages that this user can't write beside, or a disk that is full
            _keep(path, empty)


def _keep(path: Path, empty: Path) -> None:
    """In one file, without the journal that Prefect has its databases keep, and whole at every moment. All who may use the packages
    may read it: it holds tables alone."""
    empty.parent.mkdir(parents=True, exist_ok=True)
    empty.parent.chmod(0o755)
    with tempfile.TemporaryDirectory(dir=empty.parent) as folder:
        copy = Path(folder) / empty.name
        with closing(sqlite3.connect(path)) as made, closing(sqlite3.connect(copy)) as database:
            made.backup(database)
            database.execute("PRAGMA journal_mode = DELETE")
        copy.chmod(0o644)
        os.replace(copy, empty)


def _migrate(path: Path) -> None:
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
