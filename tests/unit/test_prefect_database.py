"""What keeps a Prefect server on SQLite from standing still."""

from __future__ import annotations

import asyncio
import gc
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from flows.plugins.database import close_the_cursor

WRITE = sa.text("INSERT INTO numbers VALUES (1)")
PATIENCE = 5  # seconds that SQLite waits for a lock: as long the thread of the loop would stand still


async def write(connection: AsyncConnection) -> None:
    await connection.execute(WRITE)
    await connection.commit()


async def collect_what_was_refused_while_its_connection_waits(path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", connect_args={"timeout": PATIENCE})
    async with engine.connect() as holding, engine.connect() as other:
        await holding.execute(sa.text("CREATE TABLE numbers (n)"))
        await holding.commit()
        await other.execute(sa.text("PRAGMA busy_timeout = 0"))
        await write(holding)
        await holding.execute(WRITE)  # ... and holds the lock until the loop has it commit
        with pytest.raises(OperationalError, match="locked") as refused:
            await other.execute(WRITE)
        await other.rollback()
        await other.execute(sa.text(f"PRAGMA busy_timeout = {PATIENCE * 1000}"))
        waiting = asyncio.create_task(write(other))
        await asyncio.sleep(0.5)
        del refused
        gc.collect()
        await holding.commit()
        await waiting
        assert await other.scalar(sa.text("SELECT count(*) FROM numbers")) == 3
    await engine.dispose()


def test_the_loop_does_not_wait_for_a_lock_that_it_has_to_give_back_itself(tmp_path: Path) -> None:
    gc.disable()  # the refused cursor is found when the test says so
    try:
        asyncio.run(collect_what_was_refused_while_its_connection_waits(tmp_path / "database"))
    finally:
        gc.enable()


def test_the_server_loads_it() -> None:
    modules = {entry.value for entry in entry_points(group="prefect.collections")}
    assert close_the_cursor.__module__ in modules
    assert sa.event.contains(sa.Engine, "handle_error", close_the_cursor)
