"""Files and folders that are nobody else's: made private from their first byte, mended where they are not, refused otherwise.

What is kept here are databases that hold passwords, the keys to them, weights and logs. A folder that others may write is
worse than one that they may read: what lies in it decides where passwords are sent and what is run.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from diffusion.errors import UserError

log = logging.getLogger(__name__)

OTHERS = stat.S_IRWXG | stat.S_IRWXO
PRIVATE = stat.S_IRUSR | stat.S_IWUSR
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UNSUPPORTED = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.ENOLCK)
"""What file systems answer to what they can't do."""
MOST_BYTES = 1 << 16
"""Of such a file that is read."""
FOLDERS = ("compiled", "downloads", "matplotlib", "mlflow", "prefect", "runs", "shards", "stack", "store")
"""What this project makes in its home."""


class NotPrivate(UserError):
    """A file or folder that must be the user's own can be read or changed by others."""


def use_private_home(home: Path) -> list[Path]:
    """Make the home of the installation, and all that this process and its children make from now on, private.

    What earlier versions left open is closed. Returns the folders in which others could read what is private: one that nothing
    was in yet is not told of. Downloads are no secret, and may be another user's. Raises NotPrivate if the home belongs to
    somebody else, or if others may write into one that is not ours alone to close.
    """
    os.umask(OTHERS)
    home.mkdir(parents=True, exist_ok=True)
    closed = []
    if _open_to_others(home):
        strangers = sorted({entry.name for entry in home.iterdir()} - {*FOLDERS, ".gitkeep"})
        if not strangers:
            home.chmod(stat.S_IRWXU)
            if any((home / name).exists() for name in FOLDERS if name != "downloads"):
                closed.append(home)
        elif home.stat().st_mode & OTHERS_WRITE:
            raise NotPrivate(
                f"Others may write into {home}, which also holds {', '.join(strangers[:3])}. "
                "Set TRAIN_DIFFUSION_HOME to a folder of its own."
            )
    for name in FOLDERS:
        folder = home / name
        if name != "downloads" and folder.exists() and _open_to_others(folder):
            close_to_others(folder)
            closed.append(folder)
    return closed


def _open_to_others(folder: Path) -> bool:
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise NotPrivate(
            f"{folder} belongs to another user. Set TRAIN_DIFFUSION_HOME to a folder of your own, or take this one over (chown)."
        )
    return bool(status.st_mode & OTHERS)


def close_to_others(folder: Path) -> None:
    """Take away what others may do with a folder and all that is in it; the folder first, which shuts the way to the rest."""
    folder.chmod(folder.stat().st_mode & ~OTHERS)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            # A link's target may be anywhere; what a running program deletes meanwhile is gone.
            with contextlib.suppress(FileNotFoundError):
                if not path.is_symlink():
                    path.chmod(path.lstat().st_mode & ~OTHERS)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read: whole, or not at all."""
    put(path, text.encode(), Path.replace, PRIVATE)


def create_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, unless one of that name is there already."""
    with contextlib.suppress(FileExistsError):
        put(path, text.encode(), name_anew, PRIVATE)


def name_anew(part: Path, path: Path) -> None:
    """Give a file a name that no other has. Raises FileExistsError if one has it."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(
            path.parent,
            "knows no hard links (exFAT, SMB and mounted buckets don't): a power cut may leave an empty file in place of a new one",
        )
        try:  # of several, one
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))
        except FileExistsError as taken:
            raise FileExistsError(taken.errno, taken.strerror, str(part), None, str(path)) from None
        part.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names that were given in a folder survive a power cut, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        say_once(folder, "can't flush folders: after a power cut the newest files may be missing")


_said: set[str] = set()


def say_once(folder: Path, what: str) -> None:
    """Tell what a file system can't do; of several folders, for the first."""
    if what not in _said:
        _said.add(what)
        log.warning("The file system of %s %s.", folder, what)


def put(path: Path, data: bytes, publish: Callable[[Path, Path], object], mode: int = 0o666) -> None:
    """Write a file whole, or not at all: under another name first, which `publish` (Path.replace, or name_anew) makes its own.

    Args:
        mode: who may do what with it, less what the umask takes away.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_private(path: Path) -> str:
    """What such a file holds. Raises FileNotFoundError if there is none.

    Raises NotPrivate if it is not a file of this user's, or if others can read it, change it, or put another in its place.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise NotPrivate(f"{path} is not a file of yours: it was not read.")
        if status.st_mode & OTHERS:
            raise NotPrivate(
                f"{path} can be read or changed by others: it was not used. If what it holds is still a secret: chmod 600 {path}"
            )
        for folder in (path.parent, path.parent.parent):
            inside = folder.stat()
            writable = inside.st_mode & OTHERS_WRITE and not inside.st_mode & stat.S_ISVTX
            if writable or inside.st_uid not in (os.geteuid(), 0):
                raise NotPrivate(f"Others may write into {folder}: {path.name} there was not used.")
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise NotPrivate(f"{path} has more than {MOST_BYTES:,} bytes: it is not what it should be.")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise NotPrivate(f"{path} holds no text: it is not what it should be.") from None
