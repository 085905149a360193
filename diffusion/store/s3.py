"""A store in an S3 bucket. boto3 takes a while to import: nothing imports this module but who needs it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from s3transfer.exceptions import RetriesExceededError

from diffusion.errors import StoreError, StoreRefuses
from diffusion.store.objects import OBJECT_BYTES
from diffusion.trust.identifiers import check_object_path, is_object_path

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PART_BYTES = 16 << 20
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired")
"""What S3 calls a session that is over, with a status (400) that says nothing of it."""


class S3Store:
    """A store in an S3 bucket, by boto3. A put is atomic there; requests are retried with backoff and jitter."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: S3Client | None = None

    @property
    def client(self) -> S3Client:
        """Made at first use."""
        if self._client is None:
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
        content = _Bounded()
        try:
            # The transfer also begins again where a body breaks off, which a plain get does not.
            self.client.download_fileobj(self.bucket, self._key(name), content, Config=_transfer())
        except ClientError as error:
            if _code(error) in ("NoSuchKey", "404"):
                raise KeyError(f"{self.uri}/{name}") from None
            raise self._failure("read", error) from error
        except (BotoCoreError, Boto3Error, RetriesExceededError) as error:
            raise self._failure("read", error) from error
        return content.getvalue()

    def write(self, name: str, data: bytes) -> None:
        try:
            # In parts where it is large; whole, with a checksum on the way, in any case.
            self.client.upload_fileobj(io.BytesIO(data), self.bucket, self._key(name), Config=_transfer())
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise self._failure("written", error) from error

    def create(self, name: str, data: bytes) -> bool:
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
        try:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            keys = [item.get("Key", "") for page in pages for item in page.get("Contents", [])]
        except (BotoCoreError, ClientError) as error:
            raise self._failure("listed", error) from error
        return sorted(filter(is_object_path, (key.removeprefix(self.prefix) for key in keys)))

    def delete(self, name: str) -> None:
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
    if not isinstance(error, ClientError):
        return False
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (401, 403) or _code(error) in EXPIRED


def _transfer() -> TransferConfig:
    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, num_download_attempts=8)
