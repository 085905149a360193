"""The S3 store against a real S3 server: the same behaviour as a folder, and clear errors."""

import hashlib
import os
from pathlib import Path

import pytest

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import find_dataset
from diffusion.data.sources.eurosat import Source
from diffusion.errors import StoreError
from diffusion.store.copies import LocalCopy
from diffusion.store.objects import FolderStore, check_writable, open_store
from diffusion.store.s3 import S3Store
from tests.conftest import Ingested


@pytest.fixture
def store(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3Store:
    """A store under a prefix of its own."""
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    opened = open_store(f"s3://tests/{request.node.name}")
    assert isinstance(opened, S3Store)
    return opened


def test_it_writes_reads_lists_replaces_and_deletes(store: S3Store) -> None:
    check_writable(store)
    assert store.names("") == []
    store.write("a/b/c", b"1")
    store.write("a/bc", b"2")
    store.write("a/b/c", b"3")
    assert store.names("a/b") == ["a/b/c", "a/bc"]
    assert store.read("a/b/c") == b"3"
    store.delete("a/b/c")
    with pytest.raises(KeyError):
        store.read("a/b/c")


def test_a_dataset_there_is_the_one_in_a_folder(
    store: S3Store, source: Source, ingested: Ingested, tmp_path: Path
) -> None:
    manifest = ingest(source, store, shard_bytes=60_000)
    assert manifest == ingested.manifest == find_dataset(store, source.digest)
    there = ShardImages(store, manifest, "train", 32, tmp_path / "copies")
    here = ShardImages(ingested.store, manifest, "train", 32, tmp_path / "unused")
    assert (there.shard(1)[0] == here.shard(1)[0]).all()
    # The copy serves the next reader, and a damaged copy is replaced.
    copy = tmp_path / "copies" / manifest.shards_of("train")[1].sha256
    assert copy.exists()
    copy.write_bytes(b"damaged")
    again = ShardImages(store, manifest, "train", 32, tmp_path / "copies")
    assert (again.shard(1)[0] == here.shard(1)[0]).all()
    assert not (tmp_path / "unused").exists()
    assert isinstance(ingested.store, FolderStore)


def test_wrong_keys_and_missing_buckets_say_what_to_check(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="bucket's name"):
        check_writable(open_store("s3://no-such-bucket/x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="credentials") as error:
        open_store("s3://tests/x").write("a", b"1")
    assert "wrong" not in str(error.value)


def test_a_server_that_is_gone_is_said_within_its_retries(monkeypatch: pytest.MonkeyPatch, s3: dict[str, str]) -> None:
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL_S3"):
        open_store("s3://tests/x").read("a")


def test_where_no_copy_can_be_kept_what_was_read_is_given_all_the_same(store: S3Store, tmp_path: Path) -> None:
    store.write("a", b"a")
    (tmp_path / "copies").write_text("a file, where a folder should be")
    copies = LocalCopy(store, tmp_path / "copies")
    for _ in range(2):
        assert copies.read("a", hashlib.sha256(b"a").hexdigest()) == b"a"


def test_local_copies_are_bounded_and_those_read_longest_ago_go_first(store: S3Store, tmp_path: Path) -> None:
    digests = {}
    for name in "abcd":
        store.write(name, name.encode() * 1000)
        digests[name] = hashlib.sha256(name.encode() * 1000).hexdigest()
    copies = LocalCopy(store, tmp_path, limit_bytes=2500)
    for moment, name in enumerate("abacd"):
        copies.read(name, digests[name])
        os.utime(tmp_path / digests[name], (moment, moment))  # a file system's clock may have whole seconds
        kept = {name for name, digest in digests.items() if (tmp_path / digest).exists()}
        assert len(kept) <= 2
    assert kept == {"c", "d"}
    assert copies.read("a", digests["a"]) == b"a" * 1000
