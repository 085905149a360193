"""Get files by HTTPS, and no more of them than they can have; the public EuroSAT archive: resumable, checked by its md5."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import requests
import urllib3

from diffusion.data.sources.eurosat import MIRRORS, Mirror
from diffusion.errors import DataError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
"""In a row that bring nothing."""
MOST_ATTEMPTS = 1000
CONNECT_AND_READ_SECONDS = (10, 30)
MAX_ARCHIVE_BYTES = 256 << 20
"""The public archives have 90 to 95 MB."""
MAX_SECONDS = 3600.0
"""For one try: a server that trickles is given up, and what came is kept for the next call."""
BUSY = (429, 503)
BUSY_TIMES, BUSY_SECONDS, MOST_BUSY_SECONDS = 5, 10.0, 300.0
"""How often a server may say that it is busy; the wait where it names none, and the longest that is granted."""

DOWNLOAD_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What requests raises, and what it lets through: of urllib3, of the disk, of addresses that are none."""

PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""Which name the proxy of https addresses, in the order in which requests looks at them."""
BROKEN = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
"""What ends a transfer that may go on."""

T = TypeVar("T")
Progress = Callable[[int, int | None], None]
"""Called with the bytes that are here and the bytes in all (None where the server does not tell)."""


class Busy(Exception):
    """A server wants to be asked later."""

    def __init__(self, status: int, seconds: float) -> None:
        super().__init__(f"HTTP {status}, busy")
        self.seconds = seconds


def download_eurosat(folder: Path, mirrors: Sequence[Mirror] = MIRRORS, progress: Progress | None = None) -> Path:
    """Download the first mirror that answers into `folder` and return the archive's path.

    A broken transfer is continued where it stopped, also by the next call, as long as it moves on. A mirror that is busy is
    asked again when it says, the others meanwhile. Of several calls at once one downloads, and the others wait for it.
    Raises DataError if no mirror gives the archive with its known md5, or the disk takes no more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder):
        for mirror in mirrors:
            if (folder / mirror.file_name).exists():
                return folder / mirror.file_name
        reasons: dict[str, str] = {}
        ready = dict.fromkeys(mirrors, 0.0)
        times = dict.fromkeys(mirrors, 0)
        while ready:
            mirror = min(ready, key=lambda one: max(ready[one], time.monotonic()))
            time.sleep(max(0.0, ready[mirror] - time.monotonic()))
            target = folder / mirror.file_name
            try:
                _fetch(mirror, target, progress)
                return target
            except Busy as error:
                times[mirror] += 1
                reasons[mirror.url] = str(error)
                ready[mirror] = time.monotonic() + error.seconds
                if times[mirror] == BUSY_TIMES:
                    del ready[mirror]
                else:
                    log.warning("%s is busy: asked again in %.0f s", mirror.url, error.seconds)
            except (*DOWNLOAD_ERRORS, DataError) as error:
                del ready[mirror]
                reasons[mirror.url] = reason(error)
                _stop_if_the_disk_is_full(error, folder)
                log.warning("EuroSAT is not to be had from %s: %s", mirror.url, reasons[mirror.url])
    told = "\n  ".join(f"{url}: {why}" for url, why in reasons.items())
    raise DataError(
        f"EuroSAT could not be downloaded:\n  {told}\nDownload EuroSAT_RGB.zip on a machine that can "
        "(https://zenodo.org/records/7711810) and set EUROSAT_ARCHIVE to its path."
    )


def download(url: str, limit: int) -> bytes:
    """The content of an https address, of at most `limit` bytes. Raises DataError with the reason if it is not to be had.

    A broken transfer is continued where it stopped, as long as it moves on; a busy server is asked again when it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "content")
        times = 0
        while True:
            try:
                go_on(functools.partial(_continue, url, part, limit, None), part)
                return part.read_bytes()
            except Busy as error:
                times += 1
                if times == BUSY_TIMES:
                    raise DataError(f"{url} can't be downloaded: {error}") from error
                log.warning("%s is busy: asked again in %.0f s", url, error.seconds)
                time.sleep(error.seconds)
            except DOWNLOAD_ERRORS as error:
                raise DataError(f"{url} can't be downloaded: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why something is not to be had, and what to set."""
    text = str(error)
    if isinstance(error, requests.exceptions.ProxyError):
        proxy, setting = _proxy()
        if "407" in text:
            return f"the proxy {proxy} wants a user and a password (HTTP 407). {setting} takes both, before the host's name"
        return f"the proxy {proxy} does not answer. Set {setting} right, or name the host in NO_PROXY"
    if isinstance(error, requests.exceptions.SSLError):
        if "expired" in text or "not yet valid" in text:
            return "its certificate has expired, or this machine's clock is wrong"
        if "match" in text:
            return "its certificate is for another name"
        return "its certificate is of an authority that this machine does not know. Set REQUESTS_CA_BUNDLE to a file that has it"
    if isinstance(error, requests.exceptions.ConnectTimeout) and not _proxy()[0]:
        return f"no answer within {CONNECT_AND_READ_SECONDS[0]} s. Where the way out is a proxy, set HTTPS_PROXY"
    if isinstance(error, requests.Timeout) or "timed out" in text:
        proxy, setting = _proxy()
        by = f" by the proxy {proxy} ({setting})" if proxy else ""
        first = isinstance(error, requests.exceptions.ConnectTimeout)
        return f"{'no answer within' if first else 'silence for'} {CONNECT_AND_READ_SECONDS[not first]} s{by}"
    if isinstance(error, requests.ConnectionError):
        if "NameResolution" in text or "getaddrinfo" in text or "resolve" in text:
            return "its name is not known here: there is no network, or no name server"
        return "connection refused" if "refused" in text else f"no connection ({_innermost(error)})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'here'})"
    if isinstance(error, OSError) and "TLS CA certificate bundle" in text:
        return f"the file of certificates that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names is not there ({text.rpartition(' ')[2]})"
    return text


def _proxy() -> tuple[str, str]:
    """The proxy of https addresses, without a password that may be in it, and the variable that names it; empty if none does."""
    for setting in PROXIES:
        if address := os.environ.get(setting):
            return urlsplit(address).netloc.rpartition("@")[2] or address.rpartition("@")[2], setting
    return "", "HTTPS_PROXY"


def _innermost(error: BaseException) -> str:
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    return str(error.args[-1]) if error.args else type(error).__name__


def _stop_if_the_disk_is_full(error: Exception, folder: Path) -> None:
    """No other mirror helps then."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        raise DataError(
            f"{folder} takes no more ({error.strerror}). EuroSAT needs 100 MB there; what came is kept, and gone on with. Or set "
            "TRAIN_DIFFUSION_HOME, or EUROSAT_ARCHIVE to an archive that you have."
        ) from error


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep others from downloading into a folder: two that write one file would delete each other's.

    Where the file system knows no locks, there are none.
    """
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another download into %s is under way: waiting for it.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            log.info("no lock in %s: %s", folder, error)
        yield


def _fetch(mirror: Mirror, target: Path, progress: Progress | None) -> None:
    part = target.with_name(target.name + ".part")
    begun_before = part.exists()
    while True:
        go_on(functools.partial(_continue, mirror.url, part, MAX_ARCHIVE_BYTES, progress), part)
        with part.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found == mirror.md5:
            part.rename(target)
            return
        part.unlink()
        if not begun_before:
            raise DataError(f"the file that came has md5 {found}, expected {mirror.md5}; it was deleted")
        log.warning("What lay in %s was of another file: it was deleted, and the download begins anew.", part)
        begun_before = False


def go_on(
    fetch: Callable[[int], T],
    part: Path,
    broken: tuple[type[Exception], ...] = BROKEN,
    resumable: Callable[[], bool] = lambda: True,
) -> T:
    """Fetch a file into `part`, going on where it broke off as long as each try brings it further.

    Args:
        fetch: brings what comes after the bytes that are here, whose number it is told.
        broken: its errors after which that is worth trying.
        resumable: whether the rest can be had by itself.
    """
    in_vain = 0
    for _ in range(MOST_ATTEMPTS):
        before = part.stat().st_size if part.exists() and resumable() else 0
        try:
            return fetch(before)
        except broken as error:
            # A server that was never reached is not worth waiting for; a transfer that broke is worth continuing.
            if not part.exists() or isinstance(error, requests.exceptions.SSLError | requests.exceptions.ProxyError):
                raise
            in_vain = 0 if resumable() and part.stat().st_size > before else in_vain + 1
            if in_vain == ATTEMPTS:
                raise
            time.sleep(in_vain)
    raise DataError(f"the transfer broke off {MOST_ATTEMPTS:,} times")


def _continue(url: str, part: Path, limit: int, progress: Progress | None, here: int) -> None:
    # Not packed on the way: a few bytes could become very many.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {})
    with requests.get(url, headers=headers, stream=True, timeout=CONNECT_AND_READ_SECONDS) as response:
        if response.status_code == 416:  # nothing is left to send: the md5 decides whether the file is right
            return
        if response.status_code in BUSY:
            raise Busy(response.status_code, retry_after(response.headers.get("Retry-After")))
        response.raise_for_status()
        if response.status_code != 206:  # the server does not know ranges and starts from the beginning
            here = 0
        length = response.headers.get("Content-Length")
        total = here + int(length) if length else None
        with part.open("ab" if here else "wb") as file:
            for chunk in chunks(response):
                here += len(chunk)
                if here > limit:
                    file.close()
                    part.unlink()
                    raise DataError(
                        f"more than {limit:,} bytes came from {url}: it is not what it should be; they were deleted"
                    )
                file.write(chunk)
                if progress:
                    progress(here, total)
    if total is not None and here < total:
        raise requests.ConnectionError(f"the transfer stopped after {here:,} of {total:,} bytes")


def retry_after(said: str | None) -> float:
    """The seconds that a server's `Retry-After` means, a number or a date; within what is granted."""
    seconds = BUSY_SECONDS
    if said is not None:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            seconds = float(said) if said.strip().isdigit() else _seconds_until(said)
    return min(max(seconds, 0.0), MOST_BUSY_SECONDS)


def _seconds_until(date: str) -> float:
    when = parsedate_to_datetime(date)
    return (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()


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
