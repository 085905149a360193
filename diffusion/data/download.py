"""Get the public EuroSAT archive by HTTPS: resumable, with progress, checked by its md5."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests

from diffusion.data.eurosat import MIRRORS, Mirror
from diffusion.errors import DataError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
CONNECT_AND_READ_SECONDS = (10, 30)

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
        except (requests.RequestException, DataError) as error:
            reasons.append(f"{mirror.url}: {_reason(error)}")
            log.warning("EuroSAT is not to be had from %s", reasons[-1])
    raise DataError(
        "EuroSAT could not be downloaded:\n  " + "\n  ".join(reasons) + "\nDownload EuroSAT_RGB.zip on a machine that "
        "can (https://zenodo.org/records/7711810) and set EUROSAT_ARCHIVE to its path."
    )


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
    found = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    if found != mirror.md5:
        part.unlink()
        raise DataError(f"the file that came has md5 {found}, expected {mirror.md5}; it was deleted")
    part.rename(target)


def _continue(url: str, part: Path, progress: Progress | None) -> None:
    here = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={here}-"} if here else {}
    with requests.get(url, headers=headers, stream=True, timeout=CONNECT_AND_READ_SECONDS) as response:
        if response.status_code == 416:  # nothing is left to send: the md5 decides whether the file is right
            return
        response.raise_for_status()
        if response.status_code != 206:  # the server does not know ranges and starts from the beginning
            here = 0
        length = response.headers.get("Content-Length")
        total = here + int(length) if length else None
        with part.open("ab" if here else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                file.write(chunk)
                here += len(chunk)
                if progress:
                    progress(here, total)
    if total is not None and here < total:
        raise requests.ConnectionError(f"the transfer stopped after {here:,} of {total:,} bytes")
