"""MLflow's and Prefect's databases are made and upgraded whole: killed at any moment, the next start has what was there."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from diffusion.tracking.database import WORK, is_current, make_mlflow_current
from tests.integration.test_databases import MAKE, content, earlier_mlflow, earlier_prefect, names

pytestmark = pytest.mark.slow


def kill_in_mid_migration(path: Path, program: str) -> None:
    """Make it current in a process that is killed, with all that it started, when some of the migrations have run."""
    module, make = MAKE[program]
    code = f"from pathlib import Path; import {module} as it; it.{make.__name__}(Path({str(path)!r}))"
    kept = path.read_bytes() if path.exists() else b""
    before = content(path) if kept else []
    for _ in range(5):  # on a busy machine it may be done before it is killed
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            with contextlib.suppress(sqlite3.Error):  # it is being written
                if any(
                    len(found := content(work)) > 2 and found != before
                    for work in path.parent.glob(f"{WORK}*/{path.name}")
                ):
                    break
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() in (0, -signal.SIGKILL), "it failed by itself"
        if process.returncode and not is_current(path, program):
            return
        for one in path.parent.glob(f"{path.name}*"):
            one.unlink()
        if kept:
            path.write_bytes(kept)
    raise AssertionError("it was done each time before it could be killed")


@pytest.mark.parametrize(("program", "earlier"), [("mlflow", earlier_mlflow), ("prefect", earlier_prefect)])
def test_an_interrupted_upgrade_leaves_what_was_there(
    tmp_path: Path, program: str, earlier: Callable[[Path], None]
) -> None:
    path, (_, make) = tmp_path / f"{program}.db", MAKE[program]
    earlier(path)
    before = content(path)
    kill_in_mid_migration(path, program)
    assert content(path) == before
    assert not is_current(path, program)
    make(path)
    assert is_current(path, program)
    assert "kept" in names(path, program)
    assert content(kept := path.with_name(f"{program}.db.before")) == before
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert {one.name for one in tmp_path.glob("*.db*")} == {path.name, kept.name}
    assert not [*tmp_path.glob(f"{WORK}*")]
    after = content(path)
    make(path)
    assert content(path) == after


def test_a_first_start_that_is_killed_leaves_nothing_that_a_later_one_stumbles_over(tmp_path: Path) -> None:
    """MLflow's own way, one kill in ten: a constraint that is there already, at each later start."""
    path = tmp_path / "mlflow.db"
    kill_in_mid_migration(path, "mlflow")
    assert content(path) == ["BEGIN TRANSACTION;", "COMMIT;"]
    make_mlflow_current(path)
    assert names(path, "mlflow") == {"Default"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


ROWS = "AS WITH RECURSIVE n(i) AS (VALUES(1) UNION SELECT i + 1 FROM n WHERE i < 300000) SELECT i FROM n"
SWAP = f"""
import sqlite3, sys
from pathlib import Path
from diffusion.tracking.database import make_current
def upgrade(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE more {ROWS}")
        database.execute("UPDATE some SET i = -i")
make_current(Path(sys.argv[1]), "prefect", upgrade)
"""


def size(path: Path) -> int:
    """In bytes; 0 if it isn't there: what another process writes may be gone at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_killed_while_the_new_one_takes_the_place_of_the_old_one_it_is_one_of_them(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "some.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f"PRAGMA journal_mode = {mode}")
        database.execute(f"CREATE TABLE some {ROWS}")
    written = path.with_name("some.db-journal" if mode == "delete" else "some.db-wal")
    before = path.stat().st_size
    process = subprocess.Popen([sys.executable, "-c", SWAP, str(path)])
    while process.poll() is None and size(written) < 100_000:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
        (total,) = database.execute("SELECT sum(i) FROM some").fetchone()
    whole = 300_000 * 300_001 // 2
    assert (tables, total) in [({"some"}, whole), ({"some", "more"}, -whole)]
    assert path.stat().st_size >= before
