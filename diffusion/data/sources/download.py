"""Get files by HTTPS, and no more of them than they can have; the public EuroSAT archive: resumable, checked by its md5."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import requests
import urllib3

from diffusion.data.sources.eurosat import MIRRORS, Mirror
from diffusion.errors import DataError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
CONNECT_AND_READ_SECONDS = (10, 30)
MAX_ARCHIVE_BYTES = 256 << 20
"""The public archives have 90 to 95 MB."""
MAX_SECONDS = 3600.0
"""For one try: a server that trickles is given up, and what came is kept for the next call."""

DOWNLOAD_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What requests raises, and what it lets through: of urllib3, of the disk, of addresses that are none."""

Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and the bytes in all (None where the server does not tell)."""


def download_eurosat(folder: Path, mirrors: Sequence[Mirror] = MIRRORS, progress: Progress | None = None) -> Path:
    """Download the first mirror that answers into `folder` and return the archive's path.

    A broken transfer is continued where it stopped, also by the next call. Raises DataError if no mirror gives the
    archive with its known md5.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for mirror in mirrors:
        target = folder / mirror.file_name
        try:
            _fetch(mirror, target, progress)
            return target
        except (*DOWNLOAD_ERRORS, DataError) as error:
            reasons.append(f"{mirror.url}: {_reason(error)}")
            log.warning("EuroSAT is not to be had from %s", reasons[-1])
    raise DataError(
        "EuroSAT could not be downloaded:\n  " + "\n  ".join(reasons) + "\nDownload EuroSAT_RGB.zip on a machine that "
        "can (https://zenodo.org/records/7711810) and set EUROSAT_ARCHIVE to its path."
    )


def download(url: str, limit: int) -> bytes:
    """The content of an https address, of at most `limit` bytes. Raises DataError with the reason if it is not to be had."""
    try:
        with requests.get(
            url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=CONNECT_AND_READ_SECONDS
        ) as response:
            response.raise_for_status()
            content = bytearray()
            for chunk in chunks(response):
                content += chunk
                if len(content) > limit:
                    raise DataError(
                        f"{url} has more than {limit:,} bytes. It is not what it should be, and was not read."
                    )
            return bytes(content)
    except DOWNLOAD_ERRORS as error:
        raise DataError(f"{url} can't be downloaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return "no connection" if isinstance(error, requests.ConnectionError) else str(error)


def _fetch(mirror: Mirror, target: Path, progress: Progress | None) -> None:
    part = target.with_name(target.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(mirror.url, part, progress)
            break
        except requests.RequestException:
            # A server that was never reached is not worth waiting for; a transfer that broke is worth continuing.
            if attempt == ATTEMPTS or not part.exists():
                raise
            time.sleep(attempt)
    with part.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != mirror.md5:
        part.unlink()
        raise DataError(f"the file that came has md5 {found}, expected {mirror.md5}; it was deleted")
    part.rename(target)


def _continue(url: str, part: Path, progress: Progress | None) -> None:
    here = part.stat().st_size if part.exists() else 0
    # Not packed on the way: a few bytes could become very many.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
    with requests.get(url, headers=headers, stream=True, timeout=CONNECT_AND_READ_SECONDS) as response:
        if response.status_code == 416:  # nothing is left to send: the md5 decides whether the file is right
            return
        response.raise_for_status()
        if response.status_code != 206:  # the server does not know ranges and starts from the beginning
            here = 0
        length = response.headers.get("Content-Length")
        total = here + int(length) if length else None
        with part.open("ab" if here else "wb") as file:
            for chunk in chunks(response):
                here += len(chunk)
                if here > MAX_ARCHIVE_BYTES:
                    file.close()
                    part.unlink()
                    raise DataError(
                        f"more than {MAX_ARCHIVE_BYTES:,} bytes came, which EuroSAT has not; they were deleted"
                    )
                file.write(chunk)
                if progress:
                    progress(here, total)
    if total is not None and here < total:
        raise requests.ConnectionError(f"the transfer stopped after {here:,} of {total:,} bytes")


def chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes, packed or not. Raises DataError if it takes too long, and else requests' errors alone."""
    deadline = time.monotonic() + MAX_SECONDS
    try:
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
            yield chunk
            if time.monotonic() > deadline:
                raise DataError(f"it did not come within {MAX_SECONDS / 60:.0f} minutes; start again to go on")
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from error
