"""The object store: immutable objects under slash-separated names, in a local folder or an S3 bucket.

An object appears whole or not at all. Names are relative: `datasets/<digest>/manifest.json`. One that leads out of the
store is refused (StoreError) wherever it is used.
"""

from __future__ import annotations

import contextlib
import re
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from diffusion.errors import DataError, StoreError
from diffusion.trust.identifiers import check_object_path, is_object_path
from diffusion.trust.private import name_anew, put, sync_folder
from diffusion.trust.reading import read_file

OBJECT_BYTES = 16 << 30
"""No object of ours has more; what has is not read to its end."""
UNFINISHED_SECONDS = 24 * 3600
PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""What a write calls its file until all of it is there."""


class Store(Protocol):
    """What the pipeline needs of a store."""

    uri: str

    def read(self, name: str) -> bytes:
        """The object's bytes. Raises KeyError if there is none, StoreError if the store does not answer."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put the object, replacing one of that name, all at once. Raises StoreError if the store can't be written."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Put the object unless another is there; returns whether it is there now. Raises StoreError like `write`."""
        ...

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, sorted. A remote store may show what was just written a moment late."""
        ...

    def delete(self, name: str) -> None:
        """Delete the object if there is one."""
        ...


def open_store(uri: str) -> Store:
    """The store at a folder path, a `file://` URI or an `s3://bucket/prefix` URI.

    S3 takes its endpoint and credentials the AWS way (environment, profile, instance role).
    """
    if ":" not in uri.partition("/")[0]:  # a path, in which no character means more than itself
        return FolderStore(Path(uri).expanduser())
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise StoreError(
            f"The store '{uri}' has a user or password in its address, where logs and pages would show it. "
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead."
        )
    if parts.scheme == "s3" and parts.netloc:
        from diffusion.store.s3 import S3Store

        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and not (parts.query or parts.fragment):
        as_it_stands = Path(parts.path)  # as earlier versions took it
        return FolderStore(as_it_stands if as_it_stands.exists() else Path(unquote(parts.path)))
    raise StoreError(f"The store '{uri}' is neither a folder nor s3://bucket/prefix. Set TRAIN_DIFFUSION_STORE to one.")


def check_writable(store: Store) -> None:
    """Make, replace, read back and delete one small object. Raises StoreError if any of that fails."""
    name, data = f".probe-{uuid.uuid4().hex}", b"can this store be written?"
    store.create(name, b"")
    store.write(name, data)
    if store.read(name) != data:
        raise StoreError(f"The store {store.uri} gives back other bytes than were written.")
    store.delete(name)


class FolderStore:
    """A store in a local folder, or a mounted one: what its file system can't do is said once, and done as well as it can."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.uri = str(self.folder)

    def path(self, name: str) -> Path:
        """Where an object lies, whether it exists or not."""
        return self.folder / check_object_path(name)

    def read(self, name: str) -> bytes:
        try:
            return read_file(self.path(name), OBJECT_BYTES)
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise KeyError(f"{self.uri}/{name}") from None
            raise StoreError(str(error)) from error

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data, Path.replace)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._put(name, data, name_anew)
        except FileExistsError:
            return self.read(name) == data
        return True

    def _put(self, name: str, data: bytes, publish: Callable[[Path, Path], object]) -> None:
        target = self.path(name)
        try:
            try:
                _place(target, data, publish)
            except FileNotFoundError:  # what else the folder held has just been deleted, and it as well
                _place(target, data, publish)
            sync_folder(target.parent)
        except FileExistsError as error:
            if Path(str(error.filename2 or "")) == target:
                raise
            raise self._failure(error, target) from error
        except OSError as error:
            raise self._failure(error, target) from error

    def _failure(self, error: OSError, target: Path) -> StoreError:
        return StoreError(
            f"The store {self.uri} can't be written ({error.strerror}: {error.filename or target}). "
            "Make it writable, free space there, or point TRAIN_DIFFUSION_STORE elsewhere."
        )

    def names(self, prefix: str) -> list[str]:
        # Only the folder that the prefix lies in is walked, not the whole store.
        top = self.folder / check_object_path(prefix).rpartition("/")[0]
        found = (path.relative_to(self.folder).as_posix() for path in top.rglob("*") if path.is_file())
        return sorted(
            name for name in found if name.startswith(prefix) and not name.endswith(".part") and is_object_path(name)
        )

    def unfinished(self) -> list[Path]:
        """What writes have left that were killed more than a day ago."""
        return sorted(path for path in self.folder.rglob(".*.part") if PART.fullmatch(path.name) and _is_old(path))

    def delete(self, name: str) -> None:
        target = self.path(name)
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            raise self._failure(error, target) from error
        with contextlib.suppress(OSError):  # up to the first that holds something
            for folder in target.relative_to(self.folder).parents[:-1]:
                (self.folder / folder).rmdir()


def _is_old(part: Path) -> bool:
    try:
        about = part.lstat()
    except FileNotFoundError:  # a write that goes on has put it where it belongs
        return False
    return stat.S_ISREG(about.st_mode) and about.st_mtime < time.time() - UNFINISHED_SECONDS


def _place(target: Path, data: bytes, publish: Callable[[Path, Path], object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    put(target, data, publish)
