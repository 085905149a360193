"""Tars that lie elsewhere, on S3 or the web: copied here once, and again only where they have changed there."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import urlsplit

import requests

from diffusion.data.sources.transfer import (
    BROKEN,
    CHUNK_BYTES,
    ERRORS,
    Limit,
    Progress,
    append,
    asked,
    go_on,
    one_at_a_time,
    reason,
    take,
    when_ready,
)
from diffusion.errors import DataError, StoreError
from diffusion.trust.redaction import shown

MOST_TARS = 100_000
TAR_BYTES = 64 << 30
REFUSED = {401: "you may not read it", 403: "you may not read it", 404: "there is none", 410: "there is none"}
"""Answers after which trying again helps nobody."""
_RANGE = re.compile(r"\{([^{},]+)\.\.([^{},]+?)(?:\.\.[^{},]+)?\}")
_LETTERS = 52


def expand(pattern: str) -> list[str]:
    """The names that a brace pattern stands for. Raises DataError if they are too many to be meant, or it is no pattern."""
    import braceexpand

    # The library holds all names in memory, and a range of a few bytes can stand for gigabytes.
    if _at_most(pattern) > MOST_TARS:
        raise DataError(f"{shown(pattern)} stands for more than {MOST_TARS:,} tars.")
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise DataError(f"{shown(pattern)} is no pattern of names: {error}.") from error


def _at_most(pattern: str) -> int:
    """How many names a pattern can stand for: the product of its braces' choices."""
    product, commas = 1, [0]
    for first, last in _RANGE.findall(pattern):
        try:
            product *= abs(int(last) - int(first)) + 1
        except ValueError:
            product *= _LETTERS
    for character in pattern:
        if character == "{":
            commas.append(0)
        elif character == ",":
            commas[-1] += 1
        elif character == "}" and len(commas) > 1:
            product *= commas.pop() + 1
        if product > MOST_TARS:
            break
    return product


def copy_tars(addresses: list[str], folder: Path, progress: Progress | None = None) -> list[Path]:
    """Copies of these tars in `folder`: those that are there and have not changed are not fetched again.

    Raises DataError if one is not to be had, StoreError if a server fails meanwhile (the next call goes on with that tar).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):
        return _copy_all(addresses, folder, progress)


def _copy_all(addresses: list[str], folder: Path, progress: Progress | None) -> list[Path]:
    done, copies = 0, []
    for address in addresses:
        copy = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}.tar"
        before = done

        def report(here: int, of_this: int | None, before: int = before) -> None:
            if progress:
                progress(before + here, None)

        (_copy_s3 if address.startswith("s3://") else _copy_web)(address, copy, report)
        done += copy.stat().st_size
        copies.append(copy)
    return copies


def check_address(address: str) -> None:
    """Raises DataError if it is no address that tars are read from, or shows a password to whoever sees it."""
    parts = urlsplit(address)
    if parts.scheme not in ("s3", "https", "http") or not parts.netloc:
        raise DataError(f"{shown(address)} can't be read: tars are read from this machine, s3:// and https://.")
    if "@" in parts.netloc:
        raise DataError(
            f"The address of {shown(parts.path)} has a user or password in it, where logs and pages would show it."
        )


def _copy_s3(address: str, copy: Path, report: Progress) -> None:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    from diffusion.store.s3 import S3Store

    parts = urlsplit(address)
    bucket, key, part = parts.netloc, parts.path.lstrip("/"), copy.with_suffix(".part")
    try:
        client = S3Store(bucket, "").client
        head = client.head_object(Bucket=bucket, Key=key)
        if head["ContentLength"] > TAR_BYTES:
            raise DataError(_limit(address).otherwise)
        if _is_copied(copy, head["ETag"]):
            return

        def fetch(here: int) -> None:
            # Of this version alone: what replaces it meanwhile is refused, and fetched by the next try.
            if here:
                found = client.get_object(Bucket=bucket, Key=key, IfMatch=head["ETag"], Range=f"bytes={here}-")
            else:  # an empty object has no range
                found = client.get_object(Bucket=bucket, Key=key, IfMatch=head["ETag"])
            content = iter(lambda: found["Body"].read(CHUNK_BYTES), b"")
            append(part, content, here, _limit(address), report, head["ContentLength"])

        part.unlink(missing_ok=True)
        go_on(fetch, part, (BotoCoreError, *BROKEN))
    except ClientError as error:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if status in REFUSED:
            raise DataError(
                f"{shown(address)} is not to be had: {REFUSED[status]}. Check the name, AWS_ENDPOINT_URL_S3 and the credentials "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or a profile) of the worker."
            ) from error
        raise StoreError(f"{shown(address)} can't be read now ({error}).") from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreError(
            f"{shown(address)} can't be read now ({error}). Check AWS_ENDPOINT_URL_S3 and the credentials."
        ) from error
    except OSError as error:
        raise StoreError(f"{shown(address)} can't be copied here: {reason(error)}.") from error
    _keep(part, copy, head["ETag"])


def _copy_web(address: str, copy: Path, report: Progress) -> None:
    tag, part = copy.with_suffix(".etag"), copy.with_suffix(".part")
    same, etag = tag.read_text(encoding="utf-8") if copy.exists() and tag.exists() else None, ""

    def fetch(here: int) -> bool:
        nonlocal etag
        condition = {"If-Range": etag} if here else {"If-None-Match": same} if same is not None else {}
        with asked(address, here, condition) as response:
            if response.status_code == 304:
                return False
            if response.status_code == 200:
                etag = response.headers.get("ETag", "")
            elif not _is_rest(response, etag, here):
                part.unlink()
                raise requests.ConnectionError("it was replaced meanwhile")
            take(response, part, here, _limit(address), report)
        return True

    part.unlink(missing_ok=True)
    try:
        changed = when_ready(lambda: go_on(fetch, part, resumable=lambda: etag.startswith('"')), shown(address))
    except requests.HTTPError as error:
        if error.response.status_code in REFUSED:
            raise DataError(f"{shown(address)} is not to be had: {REFUSED[error.response.status_code]}.") from error
        raise StoreError(f"{shown(address)} can't be read now: {reason(error)}.") from error
    except ERRORS as error:
        raise StoreError(f"{shown(address)} can't be read now: {reason(error)}.") from error
    if changed:
        _keep(part, copy, etag)


def _is_rest(response: requests.Response, etag: str, here: int) -> bool:
    """Whether an answer goes on with the file whose first bytes are here, or says that there are no more: not all heed If-Range."""
    ends_here = f"bytes */{here}"
    same = response.headers.get("ETag", etag) == etag
    return same and (response.status_code == 206 or response.headers.get("Content-Range", ends_here) == ends_here)


def _is_copied(copy: Path, etag: str) -> bool:
    tag = copy.with_suffix(".etag")
    return copy.exists() and tag.exists() and tag.read_text(encoding="utf-8") == etag


def _keep(part: Path, copy: Path, etag: str) -> None:
    """The tag last: it says that the copy beside it is whole."""
    copy.with_suffix(".etag").unlink(missing_ok=True)
    part.replace(copy)
    if etag:
        copy.with_suffix(".etag").write_text(etag, encoding="utf-8")


def _limit(address: str) -> Limit:
    return Limit(TAR_BYTES, f"{shown(address)} has more than {TAR_BYTES:,} bytes: cut it into more tars.")
