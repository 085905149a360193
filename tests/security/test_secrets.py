"""Passwords and keys: made whole or not at all, never in the open, changed by one command, sent to nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import smtplib
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.blocks.abstract import NotificationError
from pydantic import ValidationError

from diffusion.errors import UserError
from diffusion.trust.private import NotPrivate, read_private, use_private_home, write_private
from flows.keyring import KEY, PASSWORD, TOKEN, cluster_token, encryption_key, known_password
from flows.plugins.mail import SmtpMail
from tests.certificates import certificate, server_side
from tests.conftest import free_port
from tests.running import OLD_KEY
from tests.security.other_user import listening

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "stack"
    folder.mkdir(mode=0o700)
    return folder


@pytest.mark.parametrize("content", ["", "\n", "short", "elevenchars", "twelve\x00chars", "zwölf Zeichen"])
def test_a_password_file_without_a_password_means_no_start(keys: Path, content: str) -> None:
    write_private(keys / PASSWORD, content)
    with pytest.raises(UserError, match="make password"):
        known_password(keys)
    assert (keys / PASSWORD).read_text() == content


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 40, b"x" * 100_000])
def test_a_token_of_ray_that_is_none_means_no_start(keys: Path, content: bytes) -> None:
    assert len(made := cluster_token(keys)) == 64
    assert cluster_token(keys) == made
    (keys / TOKEN).write_bytes(content)
    with pytest.raises(UserError, match=r"no secret|no text|more than"):
        cluster_token(keys)
    assert (keys / TOKEN).read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644])
def test_a_password_that_others_can_read_is_refused(keys: Path, mode: int) -> None:
    write_private(keys / PASSWORD, "long enough for a password")
    (keys / PASSWORD).chmod(mode)
    with pytest.raises(NotPrivate, match="chmod 600"):
        known_password(keys)


def test_a_link_or_a_folder_of_others_is_no_password_file(keys: Path, tmp_path: Path) -> None:
    write_private(tmp_path / "elsewhere", "long enough for a password")
    (keys / PASSWORD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):  # noqa: PT011
        known_password(keys)
    (keys / PASSWORD).unlink()
    write_private(keys / PASSWORD, "long enough for a password")
    keys.chmod(0o777)
    with pytest.raises(NotPrivate, match="Others may write"):
        known_password(keys)


def test_a_secret_is_private_from_its_first_byte_and_whole_or_not_there(
    keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        made = known_password(keys)
    finally:
        os.umask(before)
    assert stat.S_IMODE((keys / PASSWORD).stat().st_mode) == 0o600
    assert known_password(keys) == made
    assert len(made) >= 20

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_private(keys / PASSWORD, "another one, that does not fit")
    assert read_private(keys / PASSWORD) == made
    assert [path.name for path in keys.iterdir()] == [PASSWORD]


def test_the_key_is_taken_out_of_the_database_that_it_opens(keys: Path, tmp_path: Path) -> None:
    database = tmp_path / "prefect.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE configuration (key VARCHAR, value JSON)")
        row = ["ENCRYPTION_KEY", json.dumps({"fernet_key": OLD_KEY})]
        connection.execute("INSERT INTO configuration VALUES (?, ?)", row)
    connection.close()
    assert encryption_key(keys, database) == OLD_KEY, "blocks of before could not be read"
    assert encryption_key(keys, database) == OLD_KEY
    assert OLD_KEY.encode() not in database.read_bytes()
    assert (keys / KEY).read_text() == OLD_KEY
    write_private(keys / KEY, "")
    with pytest.raises(UserError, match="holds no key"):
        encryption_key(keys, database)
    other = keys.parent / "other"
    other.mkdir(mode=0o700)
    assert encryption_key(other, tmp_path / "new.db") != OLD_KEY


def test_an_open_home_is_closed_and_one_of_others_is_refused(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        home = tmp_path / "var"
        (home / "runs/r/deep").mkdir(parents=True)
        (home / "runs/r/deep/journal").write_text("x")
        (tmp_path / "elsewhere").mkdir()
        (home / "runs/r/link").symlink_to(tmp_path / "elsewhere")
        (home / "prefect").mkdir()
        (home / "prefect/prefect.db").write_text("x")
        assert use_private_home(home) == [home, home / "prefect", home / "runs"]
        assert use_private_home(home) == []
        assert all(not path.stat().st_mode & 0o077 for path in [home, *home.rglob("*")] if not path.is_symlink())
        assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o755, "a link was followed"
        (home / "made later").write_text("x")
        assert stat.S_IMODE((home / "made later").stat().st_mode) == 0o600

        empty = tmp_path / "empty"
        (empty / "downloads").mkdir(parents=True)
        assert use_private_home(empty) == [], "a newcomer is told to change secrets that there never were"
        assert stat.S_IMODE(empty.stat().st_mode) == 0o700

        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / "holiday.jpg").write_text("x")
        (shared / "holiday.jpg").chmod(0o644)
        shared.chmod(0o755)
        use_private_home(shared)
        assert stat.S_IMODE((shared / "holiday.jpg").stat().st_mode) == 0o644, "what is not ours was changed"
        shared.chmod(0o777)
        with pytest.raises(NotPrivate, match=r"holiday\.jpg"):
            use_private_home(shared)
    finally:
        os.umask(umask)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_the_home_of_another_user_is_refused(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(NotPrivate, match="belongs to another user"):
            use_private_home(tmp_path / "theirs")
    finally:
        os.umask(umask)


# The mail server is one of ours, and what it is given is looked at.


class MailServer(threading.Thread):
    """Speaks SMTP with STARTTLS, or TLS from the start, takes any password, and keeps what it was told."""

    def __init__(self, pem: Path, from_the_start: bool) -> None:
        super().__init__(daemon=True)
        self.context = server_side(pem)
        self.from_the_start, self.told = from_the_start, b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
                self.talk(connection)
            except (OSError, ValueError):
                if self.socket.fileno() < 0:
                    return

    def talk(self, connection: socket.socket) -> None:
        if self.from_the_start:
            connection = self.context.wrap_socket(connection, server_side=True)
        connection.sendall(b"220 here\r\n")
        data = False
        while line := _line(connection):
            self.told += line
            command = line[:4].upper().strip()
            if data:
                data = line != b".\r\n"
                if not data:
                    connection.sendall(b"250 taken\r\n")
            elif command == b"EHLO":
                connection.sendall(b"250-here\r\n250-STARTTLS\r\n250 AUTH PLAIN\r\n")
            elif command == b"STAR":
                connection.sendall(b"220 go on\r\n")
                connection = self.context.wrap_socket(connection, server_side=True)
            elif command == b"DATA":
                data = True
                connection.sendall(b"354 go on\r\n")
            else:
                connection.sendall({b"AUTH": b"235 fine\r\n", b"QUIT": b"221 bye\r\n"}.get(command, b"250 fine\r\n"))
            if command == b"QUIT":
                return


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    return certificate(tmp_path, "localhost")


def block(port: int, encryption: str, **fields: object) -> SmtpMail:
    values: dict[str, object] = {"user": "nightly", "password": "the mail password"} | fields
    return SmtpMail.model_validate(
        {
            "host": "localhost",
            "port": port,
            "encryption": encryption,
            "sender": "a@example.org",
            "recipients": ["b@example.org"],
        }
        | values
    )


@pytest.mark.parametrize("encryption", ["starttls", "tls"])
def test_a_mail_server_that_nobody_vouches_for_gets_no_password(pem: Path, tmp_path: Path, encryption: str) -> None:
    server = MailServer(pem, encryption == "tls")
    server.start()
    with pytest.raises(NotificationError, match="certificate verify failed"):
        asyncio.run(block(server.port, encryption).notify("body", "subject"))
    other = certificate(tmp_path, "elsewhere.example.org")  # vouched for, and another server
    foreign = MailServer(other, encryption == "tls")
    foreign.start()
    with pytest.raises(NotificationError, match="certificate"):
        asyncio.run(block(foreign.port, encryption, ca_certificate=other.read_text()).notify("body", "subject"))
    assert b"AUTH" not in server.told + foreign.told
    asyncio.run(
        block(server.port, encryption, ca_certificate=pem.read_text()).notify("body", "a\r\nBcc: c@example.org")
    )
    assert b"AUTH" in server.told
    assert b"Bcc: c@example.org" in server.told
    assert b"\nBcc:" not in server.told, "a subject has become a header"
    server.socket.close()


def test_no_password_goes_over_an_open_link_and_no_library_error_escapes() -> None:
    with pytest.raises(ValidationError, match="unencrypted"):
        block(25, "none")
    with pytest.raises(NotificationError):
        asyncio.run(block(1, "starttls", recipients=["b@example.org\r\nBcc: c@example.org"]).notify("x", "y"))
    with pytest.raises(NotificationError):
        asyncio.run(block(1, "tls", ca_certificate="no certificate").notify("x", "y"))
    assert issubclass(smtplib.SMTPException, OSError)


# A client and its servers.


@pytest.fixture
def stranger() -> Iterator[tuple[int, list[str]]]:
    """Somebody who listens on a port of this machine, and what they are told."""
    port = free_port()
    with listening(str(port)) as told:
        yield port, told


def prefect(folder: Path, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        "HOME": str(home),
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "DO_NOT_TRACK": "1",
        **env,
    }
    command = ["prefect", "deployment", "run", "nothing-like-it"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


PROFILE = """active = "mine"

[profiles.mine]
PREFECT_API_URL = "http://127.0.0.1:9/api"
PREFECT_API_AUTH_STRING = "admin:the profile's password"
PREFECT_PLUGINS_ENABLED = "true"
"""


@pytest.mark.slow
@pytest.mark.parametrize("file", ["open to others", "without a password"])
def test_a_file_of_the_current_folder_does_not_get_the_profile_s_password(
    tmp_path: Path, stranger: tuple[int, list[str]], file: str
) -> None:
    home, folder = tmp_path / "home", tmp_path / "checkout"
    (home / ".prefect").mkdir(parents=True)
    (home / ".prefect" / "profiles.toml").write_text(PROFILE)
    (folder / "var" / "stack").mkdir(parents=True, mode=0o755)
    servers = folder / "var/stack/servers.json"
    write_private(
        servers,
        json.dumps({"PREFECT_API_URL": f"http://127.0.0.1:{stranger[0]}/api", "PATH": "/x", "LD_PRELOAD": "/x.so"}),
    )
    if file == "open to others":
        servers.chmod(0o664)
    done = prefect(folder, home, PREFECT_PROFILES_PATH=str(home / ".prefect" / "profiles.toml"))
    assert done.returncode == 1
    assert not [told for told in stranger[1] if "authorization" in told.lower()], stranger[1]
    if file == "open to others":
        assert stranger[1] == []
        assert "is not used" in done.stderr
    else:
        assert stranger[1] != [], done.stderr
