"""Local copies of what is remote, known by their sha256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Protocol

from diffusion.errors import StoreError
from diffusion.store.objects import FolderStore
from diffusion.trust.private import say_once

COPIES_BYTES = 8 << 30
SHA256 = re.compile("[0-9a-f]{64}")


class StoreDamage(StoreError):
    """An object does not have the bytes that were promised."""


class Readable(Protocol):
    """What copies are made of."""

    uri: str

    def read(self, name: str) -> bytes: ...


class LocalCopy:
    """Reads objects whose sha256 is known, keeping copies in a local folder where the store itself is remote.

    Args:
        limit_bytes: beyond this the copies that were read longest ago are deleted.
    """

    def __init__(self, store: Readable, folder: Path, limit_bytes: int = COPIES_BYTES) -> None:
        self.store, self.folder, self.limit_bytes = store, folder, limit_bytes

    def read(self, name: str, sha256: str) -> bytes:
        """The object's bytes, checked. Raises KeyError if there is none, StoreDamage if its bytes are others."""
        if isinstance(self.store, FolderStore):
            return _checked(self.store.read(name), sha256)
        if not SHA256.fullmatch(sha256):
            raise StoreDamage("has a digest that is none")
        copy = self.folder / sha256
        try:
            data = copy.read_bytes()
        except OSError:  # never there, deleted by another process meanwhile, or not to be read
            data = b""
        if hashlib.sha256(data).hexdigest() == sha256:
            with contextlib.suppress(FileNotFoundError):
                os.utime(copy)  # when it was read last
            return data
        data = _checked(self.store.read(name), sha256)
        try:
            FolderStore(self.folder).write(sha256, data)
        except StoreError as error:  # what was read is right: the next process reads it again
            say_once(self.folder, f"takes no copies, and all is read from {self.store.uri} each time ({error})")
        self._shrink(keep=copy)
        return data

    def _shrink(self, keep: Path) -> None:
        """Other processes may read and shrink the folder at the same time: what is gone is gone."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


def _checked(data: bytes, sha256: str) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise StoreDamage(f"is damaged: its sha256 is {found[:16]}…, expected {sha256[:16]}…")
    return data
