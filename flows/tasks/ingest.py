"""Images of a source -> shards and manifest."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from diffusion.data.ingest import ingest
from diffusion.data.manifest import FORMAT_VERSION, Manifest, find_dataset
from diffusion.data.sources.find import find_archive, read_source
from diffusion.data.sources.source import SourceOptions
from diffusion.errors import DataError
from diffusion.settings import settings
from diffusion.store.objects import check_writable, open_store
from flows.progress import Phase, attended
from flows.stopwatch import stopwatch
from flows.tasks.retrying import DELAYS, RETRIED, patiently


@dataclass(frozen=True)
class Archive:
    """Source images that lie on this machine, and the digest of their content."""

    source: str
    options: SourceOptions
    path: str
    digest: str


_read_source = functools.lru_cache(maxsize=1)(read_source)
"""What was proved is read again image by image, by its digests: the whole need not be proved twice."""


@task(
    name="find source",
    task_run_name="find source",
    cache_policy=NO_CACHE,
    **RETRIED,
)
def find_source(source: str, options: SourceOptions) -> Archive:
    """Find the images, or download them, and prove by their content what they are."""
    with Phase("Finding the source images", "download") as stage, stopwatch.part("ingest"):
        path = find_archive(source, settings(), lambda done, total: stage.update(done, total, f"{done / 1e6:.0f} MB"))
        return Archive(source, options, str(path), _read_source(source, path, options).digest)


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Content, format and store decide."""
    store_key = hashlib.sha256(parameters["store_uri"].encode()).hexdigest()[:16]
    return f"ingest-{FORMAT_VERSION}-{parameters['archive'].digest}-{store_key}"


@task(
    name="ingest",
    task_run_name="ingest",
    cache_key_fn=_key,
    persist_result=True,
    result_serializer="json",
    **RETRIED,
)
def _ingest(archive: Archive, store_uri: str) -> str:
    """Write the images as WebDataset shards into the store, and return the dataset's digest."""
    store = open_store(store_uri)
    check_writable(store)
    with Phase("Writing shards", "ingest") as stage, stopwatch.part("ingest"):
        source = _read_source(archive.source, Path(archive.path), archive.options)
        return ingest(source, store, lambda done, total: stage.update(done, total, f"{done:,} images")).digest


def ingest_archive(archive: Archive, store_uri: str) -> Manifest:
    """The dataset of the archive's images in the store; a cache hit if these images have been ingested there before."""
    delays = () if attended() else DELAYS
    # A hit must point to something: somebody may have emptied the store since.
    gone = patiently(lambda: find_dataset(open_store(store_uri), archive.digest), delays) is None
    try:
        digest = _ingest.with_options(refresh_cache=gone)(archive, store_uri)
    finally:
        _read_source.cache_clear()
    manifest = patiently(lambda: find_dataset(open_store(store_uri), digest), delays)
    if manifest is None:
        raise DataError(f"The dataset {digest} has vanished from the store {store_uri}. Start the flow again.")
    # Images that were ingested before keep the name and licence of then, unless the user says otherwise now.
    said = archive.options
    now = {"source": said.name or manifest.source}
    if "licence" in said.model_fields_set:
        now["licence"] = said.licence
    return manifest.model_copy(update=now)
