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


def machine_id() -> str:
    """What tells this installation of a system from others, which may have its host's name; empty where it has none."""
    try:
        return Path("/etc/machine-id").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def pid_space() -> str:
    """What tells the numbers of this container's processes from others of its machine; empty where there are none such."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Owner(BaseModel):
    """A process, so that it is told from all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str
    boot: str
    pid: int = Field(gt=0, lt=2**31)
    started: float
    """Seconds after the machine's start."""
    machine: str | None = None
    space: str | None = None
    """As `machine_id` and `pid_space`; earlier versions did not say."""

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        known = self.machine is None or self.machine == machine_id()
        # Without an id only the boot tells: another one may be another machine's.
        return self.host == socket.gethostname() and known and (self.machine != "" or self.boot == boot_id())

    @property
    def is_seen(self) -> bool:
        """Whether its number says something here: it may be of another container of this machine."""
        return self.is_here and (self.boot != boot_id() or self.space in (None, pid_space()))


def this_process() -> str:
    """This process, as text."""
    known = Owner(
        host=socket.gethostname(),
        boot=boot_id(),
        pid=os.getpid(),
        started=started(os.getpid()),
        machine=machine_id(),
        space=pid_space(),
    )
    return json.dumps(known.model_dump(), sort_keys=True)


def read_owner(text: str | None) -> Owner | None:
    """The process that a tag names; None if it names none: tags can be written by others."""
    try:
        return Owner.model_validate_json(text or "")
    except ValidationError:
        return None


def is_dead(owner: Owner) -> bool:
    """Whether a process is known to have ended: one of another machine, or of another container, never is."""
    if not owner.is_seen:
        return False
    if owner.boot != boot_id():
        return True
    try:
        ended = psutil.Process(owner.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or not is_same(owner.pid, owner.started)
    except psutil.NoSuchProcess:
        return not _is_hidden(owner.pid)
    except (psutil.AccessDenied, PermissionError):  # it is there, and another user's
        return False


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of another user's which this one may not look at (`hidepid`)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def sees_the_folder_of(owner: Owner, folder: Path) -> bool:
    """Whether this run's folder is the one that the owner works in, and not one that an earlier try left on this machine alone.

    What earlier versions began does not say whose it is: it is taken for the owner's, as it was then.
    """
    note = folder / FLOW_FOLDER / OWNER
    try:
        return read_owner(read_private(note)) == owner if note.exists() else (folder / FLOW_FOLDER / LOCK).exists()
    except (OSError, UserError):
        return False


def has_left(owner: Owner, folder: Path) -> bool:
    """Whether the process that ran a run is known to have left its folder, which this machine sees as well.

    Nobody holds the folder's lock then, and for some minutes nothing was written there. The lock alone would not do: some file systems
    keep locks to one machine. Of another container of this machine it does.
    """
    lock, now = folder / FLOW_FOLDER / LOCK, folder / FLOW_FOLDER / f"now-{os.getpid()}"
    if not lock.exists():
        return False
    try:
        newest = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
        now.touch()
        asked = now.stat().st_mtime  # by the clock of whatever keeps the files
        now.unlink()
        if asked - newest < SILENT_SECONDS and not (owner.is_here and owner.boot == boot_id()):
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
