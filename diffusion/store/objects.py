"""The object store: immutable objects under slash-separated names, in a local folder or an S3 bucket.

An object appears whole or not at all. Names are relative: `datasets/<digest>/manifest.json`. One that leads out of the
store is refused (StoreError) wherever it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote, urlsplit

from diffusion.errors import DataError, StoreError, StoreRefuses
from diffusion.trust.identifiers import check_object_path, is_object_path
from diffusion.trust.private import name_anew, put, say_once, sync_folder
from diffusion.trust.reading import read_file

if TYPE_CHECKING:
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import ClientError
    from types_boto3_s3 import S3Client

PART_BYTES = 16 << 20
OBJECT_BYTES = 16 << 30
"""No object of ours has more; what has is not read to its end."""
COPIES_BYTES = 8 << 30
UNFINISHED_SECONDS = 24 * 3600
PART = re.compile(r"\..+\.[0-9a-f]{32}\.part")
"""What a write calls its file until all of it is there."""
SHA256 = re.compile("[0-9a-f]{64}")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""What S3 calls a session that is over, with a status (400) that says nothing of it."""


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
    if "://" not in uri:  # a path, in which no character means more than itself
        return FolderStore(Path(uri).expanduser())
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise StoreError(
            f"The store '{uri}' has a user or password in its address, where logs and pages would show it. "
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile, instead."
        )
    if parts.scheme == "s3":
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and not (parts.netloc or parts.query or parts.fragment):
        return FolderStore(Path(unquote(parts.path)))
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


class S3Store:
    """A store in an S3 bucket, by boto3. A put is atomic there; requests are retried with backoff and jitter."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: S3Client | None = None

    @property
    def client(self) -> S3Client:
        """Made at first use: boto3 is not imported where the store is a folder."""
        if self._client is None:
            import boto3
            from botocore.config import Config

            config = Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"mode": "standard", "max_attempts": 5},
                max_pool_connections=16,
            )
            # A session of its own: the default one would keep the credentials of whoever used boto3 first.
            client = boto3.session.Session().client("s3", config=config)
            if "@" in urlsplit(client.meta.endpoint_url).netloc:
                raise StoreError(
                    "The S3 endpoint's address (AWS_ENDPOINT_URL_S3) has a user or password in it, where logs would show it. "
                    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
                )
            self._client = client
        return self._client

    def read(self, name: str) -> bytes:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        content = _Bounded()
        try:
            # The transfer also begins again where a body breaks off, which a plain get does not.
            self.client.download_fileobj(self.bucket, self._key(name), content, Config=_transfer())
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                raise KeyError(f"{self.uri}/{name}") from None
            raise self._failure("read", error) from error
        except (BotoCoreError, Boto3Error) as error:
            raise self._failure("read", error) from error
        return content.getvalue()

    def write(self, name: str, data: bytes) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            # In parts where it is large; whole, with a checksum on the way, in any case.
            self.client.upload_fileobj(io.BytesIO(data), self.bucket, self._key(name), Config=_transfer())
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise self._failure("written", error) from error

    def create(self, name: str, data: bytes) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
        except ClientError as error:
            if _code(error) == "NotImplemented":  # a server without conditional writes
                self.write(name, data)
                return True
            if _code(error) not in ("PreconditionFailed", "412"):
                raise self._failure("written", error) from error
            # It is there; also if an earlier try had put it, and only its answer was lost.
            return self.read(name) == data
        except BotoCoreError as error:
            raise self._failure("written", error) from error
        return True

    def names(self, prefix: str) -> list[str]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            keys = [item.get("Key", "") for page in pages for item in page.get("Contents", [])]
        except (BotoCoreError, ClientError) as error:
            raise self._failure("listed", error) from error
        return sorted(filter(is_object_path, (key.removeprefix(self.prefix) for key in keys)))

    def delete(self, name: str) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self.client.delete_object(Bucket=self.bucket, Key=self._key(name))
        except (BotoCoreError, ClientError) as error:
            raise self._failure("written", error) from error

    def _key(self, name: str) -> str:
        return self.prefix + check_object_path(name)

    def _failure(self, verb: str, error: Exception) -> StoreError:
        kind = StoreRefuses if _is_refusal(error) else StoreError
        return kind(
            f"The store {self.uri} can't be {verb} ({error}). Check the bucket's name, AWS_ENDPOINT_URL_S3 and the "
            "credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a profile)."
        )


class _Bounded(io.BytesIO):
    """Takes no more than OBJECT_BYTES."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > OBJECT_BYTES:
            raise StoreError(f"An object of the store has more than {OBJECT_BYTES:,} bytes: it is none of ours.")
        return super().write(data)


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _is_refusal(error: Exception) -> bool:
    """Whether a server answered that these credentials may not, or are no longer valid."""
    from botocore.exceptions import ClientError

    if not isinstance(error, ClientError):
        return False
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (401, 403) or _code(error) in EXPIRED


def _transfer() -> TransferConfig:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, num_download_attempts=8)


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
