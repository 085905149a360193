"""Texts that leave: without the secrets that they may hold, and without what would steer a terminal or fake a log line."""

from __future__ import annotations

import logging
import os
import re

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Characters: what is shorter stands in too many innocent words."""

_SECRET_VARIABLE = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ENCRYPTION_KEY|API_KEY")
_USER_IN_ADDRESS = re.compile(r"(?<=://)[^/?#\s\"]{1,1000}@")
"""user@ or user:password@, up to the last @ before the path."""
_SECRET_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:token|sig|secret|passw|pwd|credential|auth|jwt|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)


def redacted(text: str) -> str:
    """The text without users and passwords in addresses, and without the secrets of this process's environment."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    text = _USER_IN_ADDRESS.sub(f"{HIDDEN}@", text)
    return _SECRET_IN_QUERY.sub(rf"\1{HIDDEN}", text)


def _secrets() -> list[str]:
    """The values that this process's environment keeps secret, the longest first: one may be part of another."""
    found = set()
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            found |= {value, value.partition(":")[2]}  # user:password
        if "://" in value and "@" in value:  # an address, in which nobody may have quoted what its password holds
            found.add(value.partition("://")[2].rpartition("@")[0].partition(":")[2])
    return sorted((value for value in found if len(value) >= SHORTEST_SECRET), key=len, reverse=True)


def shown(name: str, limit: int = 120) -> str:
    """A name that somebody else has chosen, fit to be shown on one line: what does not print is escaped, the end is cut."""
    cut = name if len(name) <= limit else f"{name[: limit - 1]}…"
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


def printable(text: str) -> str:
    """A text of several lines without the characters that steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else shown(c) for c in text)


def fit_to_leave(text: str) -> str:
    """A text for a log, a page or a message: both of the above."""
    return printable(redacted(text))


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an error says first, fit to leave; its kind where it says nothing."""
    lines = fit_to_leave(str(error)).strip().splitlines()  # first: of a secret that is cut, half would stay
    return lines[0][:limit] if lines else type(error).__name__


def redact_logs() -> None:
    """Have all log records of this process, with their tracebacks, made fit to leave. Calling it again changes nothing."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return
    formatter = logging.Formatter()

    def factory(*arguments: object, **options: object) -> logging.LogRecord:
        record = make(*arguments, **options)
        try:
            message = record.getMessage()
        except Exception:  # a slip in somebody's call: logging itself says so and goes on
            message = f"{record.msg} {record.args}"
        record.msg, record.args = fit_to_leave(message), ()
        record.stack_info = fit_to_leave(record.stack_info) if record.stack_info else None
        if record.exc_info:
            record.exc_text = fit_to_leave(formatter.formatException(record.exc_info))
        return record

    factory.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(factory)
