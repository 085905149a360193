"""Bring a file here in pieces: a transfer that broke off is continued, a busy server asked again, and no more taken than may come."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import requests
import urllib3

from diffusion.errors import DataError
from diffusion.trust.redaction import shown

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
ATTEMPTS = 3
"""In a row that bring nothing."""
MOST_ATTEMPTS = 1000
CONNECT_AND_READ_SECONDS = (10, 30)
MOST_REDIRECTS = 5
MAX_SECONDS = 3600.0
"""For one try: a server that trickles is given up."""
BUSY = (429, 503)
BUSY_TIMES, BUSY_SECONDS, MOST_BUSY_SECONDS = 5, 10.0, 300.0
"""How often a server may say that it is busy; the wait where it names none, and the longest that is granted."""
NOTHING_LEFT = 416
"""The answer to who asks for what comes after the last byte."""
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


ERRORS = (Busy, requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError)
"""What a transfer raises beside DataError: what requests raises, and what it lets through: of urllib3, of the disk, of addresses
that are none."""


def may_pass(error: Exception) -> bool:
    """Whether a transfer that ended so may be had later: a server or a network was away, and refused nothing."""
    if isinstance(error, requests.HTTPError):
        return error.response is not None and error.response.status_code >= 500
    certificate = isinstance(error, requests.exceptions.SSLError)
    return isinstance(error, (Busy, *BROKEN, urllib3.exceptions.HTTPError)) and not certificate


@dataclass(frozen=True)
class Limit:
    """How large a file may become."""

    bytes: int
    otherwise: str
    """What is said of a larger one."""


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


def when_ready(fetch: Callable[[], T], name: str) -> T:
    """What `fetch` brings, from a server that may be busy at first: it is asked again when it says. Raises Busy if it stays so."""
    for _ in range(BUSY_TIMES - 1):
        try:
            return fetch()
        except Busy as error:
            log.warning("%s is busy: asked again in %.0f s", name, error.seconds)
            time.sleep(error.seconds)
    return fetch()


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


class _Session(requests.Session):
    """Follows no redirect by itself: it would first read all that one says beside where it leads."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None, whatever the answer is."""

    def leads_to(self, response: requests.Response) -> str | None:
        """Where an answer leads, if anywhere."""
        return super().get_redirect_target(response)


@contextmanager
def asked(url: str, here: int, headers: dict[str, str] | None = None) -> Iterator[requests.Response]:
    """The answer of a web server that is asked for what comes after `here` bytes. Raises Busy, and what requests raises."""
    # Not packed on the way: a few bytes could become very many.
    sent = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={here}-"} if here else {}) | (headers or {})
    first = url
    with _Session() as session:
        for _ in range(MOST_REDIRECTS):
            with session.get(url, headers=sent, stream=True, timeout=CONNECT_AND_READ_SECONDS) as response:
                target = session.leads_to(response)
                if target is None:
                    if response.status_code in BUSY:
                        raise Busy(response.status_code, retry_after(response.headers.get("Retry-After")))
                    if response.status_code != NOTHING_LEFT or not here:
                        response.raise_for_status()
                    yield response
                    return
                url = _next(url, target)
    raise DataError(f"{shown(first)} leads from one address to another, {MOST_REDIRECTS} times.")


def _next(url: str, location: str) -> str:
    """Where a redirect leads. Raises DataError if that is no address of the web, or one that others on the way can read and change."""
    to = urljoin(url, location)
    if urlsplit(to).scheme not in ("https", urlsplit(url).scheme):
        raise DataError(f"{shown(url)} leads to {shown(to)}, which is not as safe.")
    return to


def take(response: requests.Response, part: Path, here: int, limit: Limit, progress: Progress | None) -> None:
    """Write what a server sends behind the `here` bytes of `part`, or in their place where it begins anew."""
    if response.status_code == NOTHING_LEFT:
        return
    if response.status_code != 206:  # it knows no ranges, or has another file by now
        here = 0
    length = response.headers.get("Content-Length")
    append(part, chunks(response), here, limit, progress, here + int(length) if length else None)


def append(
    part: Path, content: Iterator[bytes], here: int, limit: Limit, progress: Progress | None, total: int | None
) -> None:
    """Write content behind the first `here` bytes of `part`. More than may come is deleted, and a DataError; less, a BROKEN."""
    with part.open("ab" if here else "wb") as file:
        for chunk in content:
            here += len(chunk)
            if here > limit.bytes:
                part.unlink()
                raise DataError(limit.otherwise)
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
