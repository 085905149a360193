"""The secrets of the servers that run here, in files of their own under `stack/`: their password, and Prefect's key.

Prefect would keep the key that encrypts its blocks in the database beside them: whoever got a copy of the one had both.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from pathlib import Path

from cryptography.fernet import Fernet

from diffusion.errors import UserError
from diffusion.trust.private import create_private, read_private, write_private

SHORTEST = 12
"""Characters of a password; MLflow takes none that is shorter."""
PASSWORD, KEY, TOKEN = "password", "prefect-encryption-key", "ray-token"


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
        return _secret(path, "make password makes a new one.")
    except FileNotFoundError:
        return new_password(stack)


def cluster_token(stack: Path) -> str:
    """The token of the Ray that is started here, made at the first start. Raises UserError like `known_password`."""
    path = stack / TOKEN
    create_private(path, secrets.token_hex(32))
    return _secret(path, "Move it away: the next start makes a new one.")


def _secret(path: Path, remedy: str) -> str:
    secret = read_private(path).strip()
    if len(secret) < SHORTEST or not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{path} holds no secret of {SHORTEST} or more plain characters. {remedy}")
    return secret


def encryption_key(stack: Path, own: Path) -> str:
    """The key that encrypts Prefect's blocks in this project's own database, made at the first start.

    A key that lies in the database itself is taken out of it. Raises UserError if the file holds no key.

    Args:
        own: the SQLite file.
    """
    path = stack / KEY
    if not path.exists():
        found = _key_in_database(own)
        # The file is written first: if this is killed in between, the key is in both places, and not in neither.
        create_private(path, found or Fernet.generate_key().decode())
        if found:
            _key_in_database(own, delete=True)
    key = read_private(path).strip()  # or that of somebody who was first
    try:
        Fernet(key)
    except ValueError:
        raise UserError(
            f"{path} holds no key. Restore it from a backup: without it Prefect's blocks can't be read."
        ) from None
    return key


def _key_in_database(path: Path, delete: bool = False) -> str | None:
    if not path.exists():
        return None
    try:
        return _read_key(path, delete)
    except sqlite3.Error as error:
        raise UserError(
            f"{path} can't be read ({error}). Wait for who uses it; if it is no database, move it away."
        ) from error


def _read_key(path: Path, delete: bool) -> str | None:
    with contextlib.closing(sqlite3.connect(path, timeout=120)) as database, database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'configuration'").fetchone():
            return None
        if delete:
            database.execute("PRAGMA secure_delete = ON")
            database.execute("DELETE FROM configuration WHERE key = 'ENCRYPTION_KEY'")
            return None
        row = database.execute("SELECT value FROM configuration WHERE key = 'ENCRYPTION_KEY'").fetchone()
    return str(json.loads(row[0])["fernet_key"]) if row else None
