"""A real PostgreSQL server, where the machine has one: it refuses what SQLite takes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.security.other_user import NOBODY


def programs() -> Path | None:
    """Where initdb and postgres are: Debian does not have them in the path."""
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    return Path(found).parent if found else None


@contextmanager
def running_postgres(port: int) -> Iterator[str]:
    """Serve an empty database on loopback; gives its address, with user and password."""
    password = secrets.token_hex(8)
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    as_root = os.geteuid() == 0
    # It does not run as root.
    who: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": ()} if as_root else {}
    if as_root:
        os.chown(folder, NOBODY, NOBODY)
    data, told = folder / "data", folder / "password"
    told.write_text(password)
    told.chmod(0o644)
    try:
        where = ["-D", str(data)]
        initdb = [f"{programs()}/initdb", *where, "-U", "tests", f"--pwfile={told}", "-A", "scram-sha-256", "--no-sync"]
        initdb += ["--no-locale", "-E", "UTF8"]  # whatever LANG says, of which the machine may have nothing
        subprocess.run(initdb, check=True, capture_output=True, cwd=folder, **who)
        server = [f"{programs()}/postgres", *where, "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
        server += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        process = subprocess.Popen(server, cwd=folder, stderr=subprocess.DEVNULL, **who)
        try:
            wait_until_it_listens(process, port)
            yield f"postgresql+psycopg2://tests:{password}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # whoever is still connected is not waited for
            process.wait()
    finally:
        shutil.rmtree(folder)


def wait_until_it_listens(process: subprocess.Popen[Any], port: int) -> None:
    while process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise RuntimeError("PostgreSQL did not start")
