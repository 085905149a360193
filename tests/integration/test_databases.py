"""MLflow's and Prefect's databases are made and upgraded whole: killed at any moment, the next start has what was there."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from diffusion.errors import UserError
from diffusion.tracking.database import is_current, make_current, make_mlflow_current
from flows.prefect_database import make_prefect_current

pytestmark = pytest.mark.slow

EARLIER_MLFLOW = """
import sys
from alembic import command
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base
engine = utils.create_sqlalchemy_engine(sys.argv[1])
Base.metadata.create_all(engine)
with engine.begin() as connection:
    config = utils._get_alembic_config(sys.argv[1])
    config.attributes["connection"] = connection
    command.upgrade(config, "bda7b8c39065")
    connection.exec_driver_sql("INSERT INTO experiments (name, lifecycle_stage) VALUES ('kept', 'active')")
"""
"""An MLflow of 2023: ten migrations follow, which build tables anew. The name of an experiment stands for what people have."""
KEPT = {"mlflow": "SELECT name FROM experiments", "prefect": "SELECT name FROM flow"}


def earlier_mlflow(path: Path) -> None:
    subprocess.run([sys.executable, "-c", EARLIER_MLFLOW, f"sqlite:///{path}"], check=True, capture_output=True)


def earlier_prefect(path: Path) -> None:
    """One of the migrations before the last, with a flow in it."""
    url = f"sqlite+aiosqlite:///{path}"
    env = {**os.environ, "PREFECT_HOME": str(path.parent), "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y", "-r", "bb38729c471a"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("INSERT INTO flow (id, name) VALUES ('1', 'kept')")


def content(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def names(path: Path, program: str) -> set[str]:
    with closing(sqlite3.connect(path)) as database:
        return {name for (name,) in database.execute(KEPT[program])}


MAKE = {
    "mlflow": ("diffusion.tracking.database", make_mlflow_current),
    "prefect": ("flows.prefect_database", make_prefect_current),
}


def kill_while_it_works(path: Path, program: str, delay: float) -> None:
    """Make it current in a process that is killed, with all that it started, so long after its work began."""
    module, make = MAKE[program]
    code = f"from pathlib import Path; import {module} as it; it.{make.__name__}(Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and not [*path.parent.glob(".upgrading-*/*.db")]:
        time.sleep(0.01)
    time.sleep(delay)
    assert process.poll() is None, "it was done before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(("program", "earlier"), [("mlflow", earlier_mlflow), ("prefect", earlier_prefect)])
def test_an_interrupted_upgrade_leaves_what_was_there(
    tmp_path: Path, program: str, earlier: Callable[[Path], None]
) -> None:
    path, (_, make) = tmp_path / f"{program}.db", MAKE[program]
    earlier(path)
    before = content(path)
    kill_while_it_works(path, program, random.Random(program).uniform(0.5, 2.0))
    assert content(path) == before
    assert not is_current(path, program)
    make(path)
    assert is_current(path, program)
    assert "kept" in names(path, program)
    assert content(path.with_name(f"{program}.db.before")) == before
    assert {one.name for one in tmp_path.glob("*.db*")} == {path.name, f"{path.name}.before"}
    assert not [*tmp_path.glob(".upgrading-*")]
    after = content(path)
    make(path)
    assert content(path) == after


def test_a_first_start_that_is_killed_leaves_nothing_that_a_later_one_stumbles_over(tmp_path: Path) -> None:
    """MLflow's own way, one kill in ten: a constraint that is there already, at each later start."""
    path = tmp_path / "mlflow.db"
    kill_while_it_works(path, "mlflow", 0.5)
    assert content(path) == ["BEGIN TRANSACTION;", "COMMIT;"]
    make_mlflow_current(path)
    assert names(path, "mlflow") == {"Default"}


def test_a_database_of_a_newer_version_is_refused_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('of the year 2040')")
    before = content(path)
    with pytest.raises(
        UserError, match=r"can't be brought to what mlflow 3\..* needs: .*of the year 2040.*install that one"
    ):
        make_mlflow_current(path)
    assert content(path) == before
    assert [one.name for one in tmp_path.iterdir()] == ["mlflow.db"]


def test_one_that_others_use_is_left_until_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.tracking.database.WAIT_SECONDS", 0.1)
    path = tmp_path / "prefect.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")  # as Prefect has it: who only looks is seen, too
        other.execute("CREATE TABLE flow (name)")
        other.execute("SELECT * FROM flow")
        with pytest.raises(UserError, match="is in use"):
            make_current(path, "prefect", lambda _: pytest.fail("upgraded while others use it"))
    done: list[Path] = []
    make_current(path, "prefect", done.append)
    assert len(done) == 1
    assert is_current(path, "prefect")
