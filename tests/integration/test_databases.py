"""MLflow's and Prefect's databases are made and upgraded whole, once, and by nobody under one that uses them."""

from __future__ import annotations

import functools
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from diffusion.errors import TrackingError
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
    path.write_bytes(_earlier_prefect())


@functools.cache
def _earlier_prefect() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prefect.db")
        url = f"sqlite+aiosqlite:///{path}"
        env = {**os.environ, "PREFECT_HOME": folder, "PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
        command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y", "-r", "bb38729c471a"]
        subprocess.run(command, env=env, check=True, capture_output=True)
        with closing(sqlite3.connect(path)) as database:
            with database:
                database.execute("INSERT INTO flow (id, name) VALUES ('1', 'kept')")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


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


def test_a_database_of_a_newer_version_is_refused_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('of the year 2040')")
    before = content(path)
    with pytest.raises(
        TrackingError, match=r"can't be brought to what mlflow 3\..* needs: .*of the year 2040.*install that one"
    ):
        make_mlflow_current(path)
    assert content(path) == before
    assert [one.name for one in tmp_path.iterdir()] == ["mlflow.db"]


def test_what_is_said_of_one_that_was_broken_before_is_what_is_wrong(tmp_path: Path) -> None:
    def upgrade(_: Path) -> None:
        raise RuntimeError(
            "no such table: runs\n[SQL: SELECT 1]\n(Background on this error at: https://sqlalche.me/e/20/e3q8)"
        )

    with pytest.raises(TrackingError, match="needs: no such table: runs Nothing in it has changed"):
        make_current(tmp_path / "x.db", "mlflow", upgrade)


@pytest.mark.parametrize("wrong", ["no database", "no folder"])
def test_what_can_t_be_used_is_a_sentence(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "mlflow.db"
    if wrong == "no database":
        path.write_text("a shopping list, and more than the sixteen bytes of a header" * 20)
    else:
        (tmp_path / "file").touch()
        path = tmp_path / "file" / "mlflow.db"
    with pytest.raises(TrackingError, match=r"mlflow\.db can't be used"):
        make_mlflow_current(path)


def test_one_that_others_use_is_left_until_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion.tracking.database.WAIT_SECONDS", 0.1)
    path = tmp_path / "prefect.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")  # as Prefect has it: who only looks is seen, too
        other.execute("CREATE TABLE flow (name)")
        other.execute("SELECT * FROM flow")
        with pytest.raises(TrackingError, match="used or upgraded by another process"):
            make_current(path, "prefect", lambda _: pytest.fail("upgraded while others use it"))
    done: list[Path] = []
    make_current(path, "prefect", done.append)
    assert len(done) == 1
    assert is_current(path, "prefect")


IDLE = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1])
database.execute("SELECT * FROM runs").fetchall()
print("here", flush=True)
time.sleep(600)
"""


def test_a_server_that_is_idle_is_seen_as_well(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE runs (name)")
    with subprocess.Popen([sys.executable, "-c", IDLE, str(path)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with pytest.raises(TrackingError, match=f"process {server.pid} .* has it open"):
            make_current(path, "mlflow", lambda _: pytest.fail("upgraded under a server"))
        server.kill()


def test_of_two_first_starts_at_once_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    path, made = tmp_path / "x.db", []

    def upgrade(work: Path) -> None:
        time.sleep(0.5)
        with closing(sqlite3.connect(work)) as database:
            database.execute("CREATE TABLE runs (name)")
        made.append(work)

    with ThreadPoolExecutor() as both:
        for done in [both.submit(make_current, path, "mlflow", upgrade) for _ in range(2)]:
            done.result()
    assert len(made) == 1


def test_prefect_s_first_database_is_kept_and_later_ones_begin_as_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.prefect_database.KEPT", tmp_path / "kept")
    made = [tmp_path / name / "prefect.db" for name in ("first", "second")]
    make_prefect_current(made[0])
    (kept,) = (tmp_path / "kept").iterdir()
    assert not names(kept, "prefect")
    with monkeypatch.context() as without:
        without.setattr("flows.prefect_database._migrate", lambda _: pytest.fail("migrated again"))
        make_prefect_current(made[1])
    assert content(made[0]) == content(made[1])
    assert is_current(made[1], "prefect")


def test_packages_that_can_t_be_written_beside_keep_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr("flows.prefect_database.KEPT", tmp_path / "a file" / "kept")
    monkeypatch.setattr("flows.prefect_database._migrate", earlier_prefect)
    make_prefect_current(tmp_path / "prefect.db")
    assert names(tmp_path / "prefect.db", "prefect") == {"kept"}
