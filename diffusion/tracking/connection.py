"""Reaching MLflow, and finding out before any training that it can't be reached."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from diffusion.errors import TrackingError
from diffusion.settings import DATABASE, reach_loopback_directly, settings
from diffusion.tracking.database import make_mlflow_current
from diffusion.trust.redaction import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

T = TypeVar("T")

ANSWER_SECONDS = 10
AGAIN_SECONDS = 5.0
PATIENCE_SECONDS = 600.0
"""A server that is restarted, upgraded or moved is away for minutes: what has been computed is worth waiting for it."""

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # The sender repeats whole batches by itself; the client's own patience, minutes by default, would only hide an outage.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


FILE_SECONDS = 600
"""For one file: a server that hands it on to a store of its own answers when that has it."""


class Unreachable(TrackingError):
    """The tracking server does not answer."""


def when_it_answers(call: Callable[[], T]) -> T:
    """What a call of MLflow returns, however long the server takes to come back. It may be made several times.

    Raises TrackingError after ten minutes; and what the server itself answers, at once.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            if _is_an_answer(error):
                raise
            said = first_line(error)
            if time.monotonic() > deadline:
                raise TrackingError(
                    f"MLflow has not answered for {PATIENCE_SECONDS / 60:.0f} minutes: {said}"
                ) from None
            log.warning("MLflow does not answer (%s); trying again in %.0f s.", said, AGAIN_SECONDS)
            time.sleep(AGAIN_SECONDS)


def _is_an_answer(error: Exception) -> bool:
    """Whether another try would be answered alike."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):  # of a connection that failed it says 500
        return error.get_http_status_code() < 500
    return isinstance(error, TrackingError) and not isinstance(error, Unreachable)


def connect(uri: str) -> MlflowClient:
    """A client of the tracking server that is known to answer.

    Raises Unreachable within ANSWER_SECONDS if the server is dead, silent or refuses, TrackingError if the database is unusable.
    """
    reach_loopback_directly()
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https") and "@" in urlsplit(uri).netloc:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI '{uri}' has a user or password in its address, where logs and pages would show it. Set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead."
        )
    if scheme == "sqlite":
        if "?" in uri:
            raise TrackingError(
                f"The path of MLflow's database has a ?, behind which it would read options: {uri}. Move it."
            )
        _use_database(Path(uri.split("///", 1)[-1]))
    elif scheme not in ("http", "https"):
        raise TrackingError(f"MLFLOW_TRACKING_URI '{uri}' is neither http(s)://… nor sqlite:////absolute/path.")

    import mlflow
    from mlflow import MlflowClient

    # Files come through the server: the address in the store that it would hand out may be one that it alone can reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    # Model versions are made through the global address whatever the client's is.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    client = MlflowClient(uri, uri)
    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(ANSWER_SECONDS)):
        try:
            client.search_experiments(max_results=1)
        except Exception as error:  # MLflow lets the errors of requests, urllib3 and SQLAlchemy through
            raise Unreachable(
                f"The MLflow server at {uri} does not answer as it should ({first_line(error)}). "
                "Start it (make up), or correct MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            ) from None
    return client


def _use_database(path: Path) -> None:
    """Have it be there and whole. One that is not this installation's own, or read only, is left to MLflow."""
    if not path.is_absolute():
        raise TrackingError(f"MLFLOW_TRACKING_URI names the relative path '{path}': give an absolute one, sqlite:////…")
    own = path == settings().home / DATABASE and os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    if own or not path.exists():
        make_mlflow_current(path)
    try:
        with sqlite3.connect(path, timeout=5) as database:
            database.execute("begin immediate")
            database.rollback()
        database.close()
    except (sqlite3.Error, OSError) as error:
        remedy = "Wait for who has it locked" if "locked" in str(error) else "Move it away or make it writable"
        raise TrackingError(f"The MLflow database {path} can't be used ({error}). {remedy}.") from error


@contextmanager
def patient_with_files() -> Iterator[None]:
    """Large files are sent in here: the server takes longer over them than over anything else."""
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=str(FILE_SECONDS)):
        yield


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
