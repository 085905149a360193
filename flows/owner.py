"""Who runs a flow run: a process, told from all others, which other machines that see its folder can see to live."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion.errors import UserError
from diffusion.jobs.lock import LOCK
from diffusion.jobs.started import is_same, started
from diffusion.trust.private import read_private, write_private

FLOW_FOLDER = "flow"
"""Of a run's folder, what the flow locks; the folder itself is locked by its jobs."""
OWNER = "owner.json"
"""In there, who runs it: on a machine that sees the same folder, what MLflow has as well."""
SILENT_SECONDS, SIGN_SECONDS = 240.0, 30.0
"""After so long without a sign of life a run of another machine is gone; and between two signs."""


def boot_id() -> str:
    """What tells this boot of this machine from others: a pid means nothing after the next one."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else f"{psutil.boot_time():.0f}"


class Owner(BaseModel):
    """A process, so that it is told from all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    boot: str
    pid: int = Field(gt=0, lt=2**31)
    started: float
    """Seconds after the machine's start."""


def this_process() -> str:
    """This process, as text."""
    known = Owner(host=socket.gethostname(), boot=boot_id(), pid=os.getpid(), started=started(os.getpid()))
    return json.dumps(known.model_dump(), sort_keys=True)


def read_owner(text: str | None) -> Owner | None:
    """The process that a tag names; None if it names none: tags can be written by others."""
    try:
        return Owner.model_validate_json(text or "")
    except ValidationError:
        return None


def is_dead(owner: Owner) -> bool:
    """Whether a process is known to have ended: one of another machine never is."""
    if owner.host != socket.gethostname():
        return False
    if owner.boot != boot_id():
        return True
    try:
        ended = psutil.Process(owner.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or not is_same(owner.pid, owner.started)
    except psutil.NoSuchProcess:
        return True


def sees_the_folder_of(owner: Owner, folder: Path) -> bool:
    """Whether this run's folder is the one that the owner works in, and not one that an earlier try left on this machine alone.

    What earlier versions began does not say whose it is: it is taken for the owner's, as it was then.
    """
    note = folder / FLOW_FOLDER / OWNER
    try:
        return read_owner(read_private(note)) == owner if note.exists() else (folder / FLOW_FOLDER / LOCK).exists()
    except (OSError, UserError):
        return False


def has_left(folder: Path) -> bool:
    """Whether the process that ran a run is known to have left its folder, which this machine sees as well.

    Nobody holds the folder's lock then, and for some minutes nothing was written there. The lock alone would not do: some file systems
    keep locks to one machine.
    """
    lock, now = folder / FLOW_FOLDER / LOCK, folder / FLOW_FOLDER / f"now-{os.getpid()}"
    if not lock.exists():
        return False
    try:
        newest = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
        now.touch()
        asked = now.stat().st_mtime  # by the clock of whatever keeps the files
        now.unlink()
        if asked - newest < SILENT_SECONDS:
            return False
        with lock.open("r+b") as file:  # NFS locks only what may be written
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody holds it, or has just renamed what was looked at; or there are no locks here
        return False
    return True


@contextmanager
def signs_of_life(folder: Path) -> Iterator[None]:
    """Have a run's folder say that this process runs it, and be written to all the time, by which other machines see that it lives."""
    write_private(folder / FLOW_FOLDER / OWNER, this_process())
    ended = threading.Event()

    def sign() -> None:
        while not ended.wait(SIGN_SECONDS):
            with suppress(OSError):  # a file server that is away: the next one may reach it
                os.utime(folder / FLOW_FOLDER / LOCK)

    thread = threading.Thread(target=sign, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(SIGN_SECONDS)
