"""SQLite databases of MLflow and Prefect, made and upgraded whole.

Their migrations are many statements, each kept at once: of one that is killed in between, a database is left that no later start can
use. So they work on a copy, which takes the place of what was there in one transaction.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from diffusion.errors import UserError

Upgrade = Callable[[Path], None]
"""Brings an SQLite file, empty or of an earlier version, to what the installed version of a program needs."""
WAIT_SECONDS = 120.0
"""For another process that does the same."""
WORK = ".upgrading-"


def is_current(path: Path, program: str) -> bool:
    """Whether `make_current` has seen to it before, with the version of the program that is installed."""
    if not path.exists():
        return False
    with _opened(path) as database:
        return bool(database.execute("PRAGMA user_version").fetchone()[0] == _mark(program))


def make_current(path: Path, program: str, upgrade: Upgrade) -> None:
    """Have a database be what the installed version of a program needs: made, or upgraded, or left as it is.

    Killed at any moment, it leaves what was there before. What is upgraded is kept beside it first, as `<name>.before`.

    Args:
        program: the distribution whose database it is: mlflow, prefect.

    Raises UserError if it can't be upgraded, or others use it meanwhile; nothing in it has changed then.
    """
    if is_current(path, program):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _owned(path) as own:
        if own.execute("PRAGMA user_version").fetchone()[0] == _mark(program):
            return  # somebody else was first
        for left in path.parent.glob(f"{WORK}{path.name}-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{WORK}{path.name}-") as folder:
            work = Path(folder, path.name)
            with _opened(work) as copy:
                own.backup(copy)
            before = _schema(work)
            try:
                upgrade(work)
            except Exception as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]
                raise UserError(
                    f"{path} can't be brought to what {program} {version(program)} needs: {said} Nothing in it has changed. If a "
                    "newer version wrote it, install that one again. If nothing in it would be missed, move it away."
                ) from error
            if before and _schema(work) != before:
                with _opened(path.with_name(f"{path.name}.before")) as kept:
                    own.backup(kept)
            with _opened(work) as made:
                made.execute(f"PRAGMA user_version = {_mark(program)}")
                made.backup(own)


def make_mlflow_current(path: Path) -> None:
    """MLflow's tracking database, which is its registry as well."""
    make_current(path, "mlflow", partial(_upgrade_mlflow, artifacts=path.parent / "artifacts"))


def _upgrade_mlflow(path: Path, artifacts: Path) -> None:
    uri = f"sqlite:///{path}"
    if not _schema(path):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(uri, artifacts.as_uri()).engine.dispose()
        return
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  a path of ours
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def _mark(program: str) -> int:
    """What an SQLite file can carry for its users: a number of 31 bits."""
    return zlib.crc32(f"{program} {version(program)}".encode()) >> 1


def _schema(path: Path) -> list[tuple[str]]:
    """The revisions of the migrations that have run; none in a new file."""
    with _opened(path) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return []
        return database.execute("SELECT version_num FROM alembic_version").fetchall()


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as database:
        yield database


@contextmanager
def _owned(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, which nobody else reads or writes meanwhile."""
    with _opened(path) as database:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        try:
            database.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{path} has to be upgraded, and is in use ({error}). End what uses it (make down) and start again."
            ) from None
        database.execute("COMMIT")  # the lock stays
        yield database
