"""Keeps a Prefect server on SQLite from standing still. The server loads it by the entry point `prefect.collections`.

Where two transactions of the server meet, SQLite refuses a statement at once ("database is locked"): Prefect tries again, or has its
client do so. But nobody closes the cursor that was refused. It lives on in the traceback until it is collected, which may be on the
thread of the event loop, and resets its statement then: SQLite waits until nobody else uses the connection. Somebody else may use it
by now, and wait for a write to end that the event loop has to end. So all of the server stands still until SQLite gives up, a minute
later: no page, no state, no notification.
"""

from __future__ import annotations

import sqlite3
import traceback

import aiosqlite
from sqlalchemy import event
from sqlalchemy.engine import Engine, ExceptionContext


@event.listens_for(Engine, "handle_error")
def close_the_cursor(context: ExceptionContext) -> None:
    """On its own thread, and while the connection is still its own."""
    error = context.original_exception
    connection = context.connection.connection.dbapi_connection if context.connection else None
    if context.dialect.driver != "aiosqlite" or connection is None or not isinstance(error, sqlite3.Error):
        return
    refused = {
        id(value): value
        for frame, _ in traceback.walk_tb(error.__traceback__)
        for value in frame.f_locals.values()
        if isinstance(value, aiosqlite.Cursor)
    }
    for cursor in refused.values():
        connection.run_async(lambda _, cursor=cursor: cursor.close())
