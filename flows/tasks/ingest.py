"""EuroSAT archive -> shards and manifest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from diffusion.data.find import find_archive, read_source
from diffusion.data.ingest import find_dataset, ingest
from diffusion.data.manifest import FORMAT_VERSION, Manifest
from diffusion.data.store import check_writable, open_store
from diffusion.errors import DataError
from diffusion.settings import settings
from flows.progress import Stage
from flows.tasks.retrying import worth_retrying


@dataclass(frozen=True)
class Archive:
    """Source images that lie on this machine, and the digest of their content."""

    source: str
    path: str
    digest: str


@task(name="find source", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=worth_retrying)
def find_source(source: str) -> Archive:
    """Find the archive, or download it, and prove by its content what it is."""
    with Stage("Finding the source images", "download") as stage:
        path = find_archive(source, settings(), lambda done, total: stage.update(done, total, f"{done / 1e6:.0f} MB"))
        return Archive(source, str(path), read_source(source, path).digest)


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Content, store and format decide. Without the manifest in the store there is nothing that a hit could point to."""
    archive, store_uri = parameters["archive"], parameters["store_uri"]
    if find_dataset(open_store(store_uri), archive.digest) is None:
        return None
    store_key = hashlib.sha256(store_uri.encode()).hexdigest()[:16]
    return f"ingest-{FORMAT_VERSION}-{archive.digest}-{store_key}"


@task(
    name="ingest",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=worth_retrying,
)
def ingest_archive(archive: Archive, store_uri: str) -> str:
    """Write the images as WebDataset shards into the store, and return the dataset's digest."""
    store = open_store(store_uri)
    check_writable(store)
    source = read_source(archive.source, Path(archive.path))
    with Stage("Writing shards", "ingest") as stage:
        return ingest(source, store, lambda done, total: stage.update(done, total, f"{done:,} images")).digest


def dataset_of(digest: str, store_uri: str) -> Manifest:
    """The manifest of a dataset that was ingested. Raises DataError if it is gone."""
    manifest = find_dataset(open_store(store_uri), digest)
    if manifest is None:
        raise DataError(f"The dataset {digest} has vanished from the store {store_uri}. Start the flow again.")
    return manifest
