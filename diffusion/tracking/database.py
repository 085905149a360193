"""SQLite databases of MLflow and Prefect, made and upgraded whole.

Their migrations are many statements, each kept at once: of one that is killed in between, a database is left that no later start can
use. So they work on a copy, which takes the place of what was there in one transaction.
"""

from __future__ import annotations

import glob
import os
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

import psutil

from diffusion.errors import TrackingError

Upgrade = Callable[[Path], None]
"""Brings an SQLite file, empty or of an earlier version, to what the installed version of a program needs."""
WAIT_SECONDS = 120.0
"""For another process that does the same."""
WORK = ".upgrading-"
NOTHING_SAID = ("(Background on this error", "[SQL: ", "[parameters: ")
"""How lines of an error begin that say nothing of it."""


def is_current(path: Path, program: str) -> bool:
    """Whether `make_current` has seen to it before, with the version of the program that is installed.

    Raises TrackingError if it is no database, or can't be read.
    """
    if not path.exists():
        return False
    with _told(path), _opened(path) as database:
        return _marked(database, program)


def make_current(path: Path, program: str, upgrade: Upgrade) -> None:
    """Have a database be what the installed version of a program needs: made, or upgraded, or left as it is.

    Killed at any moment, it leaves what was there before. What is upgraded is kept beside it first, as `<name>.before`.

    Args:
        program: the distribution whose database it is: mlflow, prefect.

    Raises TrackingError if it can't be upgraded, or others use it meanwhile; nothing in it has changed then.
    """
    if is_current(path, program):
        return
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with _owned(path) as own:
            if not _marked(own, program):  # else somebody else was first
                _replace(path, own, program, upgrade)


def make_mlflow_current(path: Path) -> None:
    """MLflow's tracking database, which is its registry as well."""
    make_current(path, "mlflow", partial(_upgrade_mlflow, artifacts=path.parent / "artifacts"))


def _replace(path: Path, own: sqlite3.Connection, program: str, upgrade: Upgrade) -> None:
    for left in path.parent.glob(f"{WORK}{glob.escape(path.name)}-*"):
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{WORK}{path.name}-"))  # for this user alone
    try:
        work, kept = folder / path.name, folder / "before"
        with _opened(work) as copy:
            own.backup(copy)
        shutil.copy(work, kept)
        before = _schema(work)
        try:
            upgrade(work)
        except Exception as error:
            raise TrackingError(
                f"{path} can't be brought to what {program} {version(program)} needs: {_what_is_said(error)} Nothing in it has "
                "changed. If a newer version wrote it, install that one again. If nothing in it would be missed, move it away."
            ) from error
        if before and _schema(work) != before:
            kept.chmod(0o600)
            os.replace(kept, path.with_name(f"{path.name}.before"))
        with _opened(work) as made:
            made.execute(f"PRAGMA user_version = {_mark(program)}")
            made.backup(own)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _upgrade_mlflow(path: Path, artifacts: Path) -> None:
    uri = f"sqlite:///{path}"
    if not _schema(path):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(uri, artifacts.as_uri()).engine.dispose()
        return
    # -P, and not where the caller stands: nothing of that folder is imported.
    command = [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", uri]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True)  # noqa: S603  a path of ours
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


def _what_is_said(error: Exception) -> str:
    """The last line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(NOTHING_SAID)]
    return (telling or [type(error).__name__])[-1][:300]


def _mark(program: str) -> int:
    """What an SQLite file can carry for its users: a number of 31 bits."""
    return zlib.crc32(f"{program} {version(program)}".encode()) >> 1


def _marked(database: sqlite3.Connection, program: str) -> bool:
    return bool(database.execute("PRAGMA user_version").fetchone()[0] == _mark(program))


def _schema(path: Path) -> list[tuple[str, str]]:
    with _opened(path) as database:
        return _schema_of(database)


def _schema_of(database: sqlite3.Connection) -> list[tuple[str, str]]:
    """All tables and indices; none in a new file."""
    return database.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the disk as sentences."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if "locked" in str(error):
            raise TrackingError(
                f"{path} is used or upgraded by another process. Wait for it, or end it (make down), and start again."
            ) from error
        raise TrackingError(
            f"{path} can't be used ({error}). Nothing in it has changed. Make room, or the file and its folder writable; "
            "if it is no database, move it away."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, timeout=WAIT_SECONDS, isolation_level=None)) as database:
        yield database


@contextmanager
def _owned(path: Path) -> Iterator[sqlite3.Connection]:
    """The database, which nobody else reads or writes meanwhile."""
    with _opened(path) as database:
        if _schema_of(database) and (user := _other_user(path)):
            raise TrackingError(
                f"{path} has to be upgraded, and process {user} has it open. Wait for it or end it (make down), and start again."
            )
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        database.execute("COMMIT")  # the lock stays
        yield database


def _other_user(path: Path) -> str:
    """Another process that has the file open, as its number and name: a server that is idle holds no lock."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(file.path == str(path.resolve()) for file in process.open_files()):
                return f"{process.pid} ({process.name()})"
        except psutil.Error:
            continue
    return ""
