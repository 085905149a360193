"""The public EuroSAT archive, from whichever mirror has it, checked by its md5; and small files that settings name."""

from __future__ import annotations

import errno
import hashlib
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from diffusion.data.sources.eurosat import MIRRORS, Mirror
from diffusion.data.sources.transfer import (
    BUSY_TIMES,
    ERRORS,
    Busy,
    Limit,
    Progress,
    asked,
    go_on,
    may_pass,
    one_at_a_time,
    reason,
    take,
    when_ready,
)
from diffusion.errors import DataError, StoreError

log = logging.getLogger(__name__)

MAX_ARCHIVE_BYTES = 256 << 20
"""The public archives have 90 to 95 MB."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


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
            except (*ERRORS, DataError) as error:
                del ready[mirror]
                reasons[mirror.url] = reason(error)
                _stop_if_the_disk_is_full(error, folder)
                log.warning("EuroSAT is not to be had from %s: %s", mirror.url, reasons[mirror.url])
    told = "\n  ".join(f"{url}: {why}" for url, why in reasons.items())
    raise DataError(
        f"EuroSAT could not be downloaded:\n  {told}\nDownload EuroSAT_RGB.zip on a machine that can "
        "(https://zenodo.org/records/7711810) and set EUROSAT_ARCHIVE to its path."
    )


def download(url: str, most_bytes: int) -> bytes:
    """The content of an https address. Raises StoreError if it can't be had now, DataError if never: what is wrong, or too large.

    A broken transfer is continued where it stopped, as long as it moves on; a busy server is asked again when it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "content")
        try:
            when_ready(lambda: _bring(url, part, most_bytes), url)
        except ERRORS as error:
            kind = StoreError if may_pass(error) else DataError
            raise kind(f"{url} can't be downloaded: {reason(error)}") from error
        return part.read_bytes()


def _stop_if_the_disk_is_full(error: Exception, folder: Path) -> None:
    """No other mirror helps then."""
    if isinstance(error, OSError) and error.errno in FULL:
        raise DataError(
            f"{folder} takes no more ({error.strerror}). EuroSAT needs 100 MB there; what came is kept, and gone on with. Or set "
            "TRAIN_DIFFUSION_HOME, or EUROSAT_ARCHIVE to an archive that you have."
        ) from error


def _fetch(mirror: Mirror, target: Path, progress: Progress | None) -> None:
    part = target.with_name(target.name + ".part")
    begun_before = part.exists()
    while True:
        _bring(mirror.url, part, MAX_ARCHIVE_BYTES, progress)
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


def _bring(url: str, part: Path, most_bytes: int, progress: Progress | None = None) -> None:
    limit = Limit(
        most_bytes, f"more than {most_bytes:,} bytes came from {url}: it is not what it should be; they were deleted"
    )

    def fetch(here: int) -> None:
        with asked(url, here) as response:
            take(response, part, here, limit, progress)

    go_on(fetch, part)
