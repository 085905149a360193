"""Stores on file systems that can't link, flush folders or lock, such as exFAT, SMB and mounted buckets."""

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from diffusion.data.ingest import ingest
from diffusion.data.sources.source import Source
from diffusion.errors import StoreError
from diffusion.jobs.lock import lock_folder
from diffusion.store.objects import FolderStore, check_writable
from diffusion.trust import private


@pytest.fixture
def poor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the calls answer there."""
    fsync = os.fsync

    def link(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    def flush(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(private, "_said", set())


@pytest.mark.usefixtures("poor")
def test_it_works_and_what_is_weaker_is_said_once(
    tmp_path: Path, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    store = FolderStore(tmp_path / "store")
    check_writable(store)
    assert store.create("a/name", b"one")
    assert not store.create("a/name", b"two")
    assert store.create("a/name", b"one"), "it is there"
    store.write("a/name", b"three")
    assert store.read("a/name") == b"three"
    manifest = ingest(source, store, shard_bytes=60_000)
    assert len(store.names("datasets/")) == len(manifest.shards) + 1
    with lock_folder(tmp_path / "run"), lock_folder(tmp_path / "run"):
        pass
    said = [record.getMessage() for record in caplog.records]
    for what in ("knows no hard links", "can't flush folders", "knows no locks"):
        assert len([one for one in said if what in one]) == 1, said
    assert not [path for path in tmp_path.rglob("*.part")]


def test_what_can_t_be_made_anew_is_found_before_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="Input/output error"):
        check_writable(FolderStore(tmp_path))


def test_what_is_deleted_leaves_no_empty_folder(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    for name in ("checkpoints/run/1/model", "checkpoints/run/2/model", "checkpoints/run/2/journal"):
        store.write(name, b"x")
    for name in ("checkpoints/run/1/model", "checkpoints/run/2/model"):
        store.delete(name)
    assert [path.name for path in (tmp_path / "store" / "checkpoints" / "run").iterdir()] == ["2"]
    store.delete("checkpoints/run/2/journal")
    assert list((tmp_path / "store").iterdir()) == []
    store.delete("checkpoints/run/2/journal")  # again changes nothing
    store.write("checkpoints/run/3/model", b"x")


def test_a_folder_that_is_deleted_under_a_write_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, kept = FolderStore(tmp_path), private.put

    def put(path: Path, *arguments: object) -> None:
        monkeypatch.setattr("diffusion.store.objects.put", kept)
        path.parent.rmdir()
        kept(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("diffusion.store.objects.put", put)
    store.write("a/b", b"x")
    assert store.read("a/b") == b"x"
