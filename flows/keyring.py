"""The secrets of the servers that run here, in files of their own under `stack/`: their password, and Prefect's key.

Prefect would keep the key that encrypts its blocks in the database beside them: whoever got a copy of the one had both.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path

from diffusion.errors import UserError
from diffusion.trust.private import read_private, write_private

SHORTEST = 12
"""Characters of a password; MLflow takes none that is shorter."""
PASSWORD, KEY = "password", "prefect-encryption-key"


def new_password(stack: Path) -> str:
    """Make a password, which takes the place of the one before."""
    password = secrets.token_urlsafe(18)
    write_private(stack / PASSWORD, password)
    return password


def known_password(stack: Path) -> str:
    """The password of the servers, made at the first start.

    Raises UserError if its file is empty, short, or open to others: no password is ever taken for one that is none.
    """
    path = stack / PASSWORD
    try:
        password = read_private(path).strip()
    except FileNotFoundError:
        return new_password(stack)
    if len(password) < SHORTEST or not (password.isascii() and password.isprintable()):
        raise UserError(
            f"{path} holds no password of {SHORTEST} or more plain characters. make password makes a new one."
        )
    return password


def encryption_key(stack: Path, database: str) -> str:
    """The key that encrypts Prefect's blocks, made at the first start; one that lies in the database is taken out of it.

    Args:
        database: the database's URL, as Prefect takes it.
    """
    path = stack / KEY
    try:
        return read_private(path).strip()
    except FileNotFoundError:
        pass
    from cryptography.fernet import Fernet

    # The file is written first: if this is killed in between, the key is in both places, and not in neither.
    found = asyncio.run(_key_in_database(database))
    key = found or Fernet.generate_key().decode()
    write_private(path, key)
    if found:
        asyncio.run(_key_in_database(database, delete=True))
    return key


async def _key_in_database(url: str, delete: bool = False) -> str | None:
    from sqlalchemy import inspect, text
    from sqlalchemy.ext.asyncio import create_async_engine

    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            if "configuration" not in await connection.run_sync(lambda sync: inspect(sync).get_table_names()):
                return None
            if delete:
                if engine.dialect.name == "sqlite":
                    await connection.execute(text("PRAGMA secure_delete = ON"))
                await connection.execute(text("DELETE FROM configuration WHERE key = 'ENCRYPTION_KEY'"))
                return None
            value = await connection.scalar(text("SELECT value FROM configuration WHERE key = 'ENCRYPTION_KEY'"))
    finally:
        await engine.dispose()
    fields = json.loads(value) if isinstance(value, str) else value
    return str(fields["fernet_key"]) if fields else None
