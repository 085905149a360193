"""Shards, manifest, ingestion, loader and the folder store."""

import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages, prefetch
from diffusion.data.manifest import Manifest, parse_manifest
from diffusion.data.order import Order
from diffusion.data.shards import Sample, bytes_in_shard, decode, read_shard, write_shard
from diffusion.data.sources.source import Source
from diffusion.data.spec import Images, Labels
from diffusion.data.split import split_by_hash
from diffusion.errors import DataError, StoreError
from diffusion.store import layout
from diffusion.store.objects import FolderStore, check_writable, open_store
from tests.conftest import Ingested
from tests.specs import RGB_SPEC

keys = st.from_regex(r"[A-Za-z_0-9]{1,40}", fullmatch=True)
samples = st.lists(
    st.builds(
        Sample,
        key=keys,
        content=st.binary(min_size=1, max_size=2000),
        label=st.none() | st.integers(0, 9),
        extension=st.sampled_from(["jpg", "npy"]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda sample: sample.key,
)


@given(samples)
def test_a_shard_gives_back_its_samples_and_is_the_same_bytes_again(written: list[Sample]) -> None:
    data = write_shard(written)
    assert read_shard(data, "x") == written
    assert data == write_shard(written)
    assert data == by_tarfile(written), "the digests of shards that were written before would move"
    sizes = [bytes_in_shard(len(sample.content), sample.label is not None) for sample in written]
    assert sum(sizes) <= len(data) <= sum(sizes) + 20 * 512


@given(samples, st.data())
def test_a_header_with_any_byte_changed_is_damaged(written: list[Sample], draw: st.DataObject) -> None:
    data = bytearray(write_shard(written))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        header = draw.draw(st.sampled_from([member.offset for member in tar]))
    place = header + draw.draw(st.integers(0, 511))
    data[place] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(DataError, match=r"The shard x is damaged .*ingest again"):
        read_shard(bytes(data), "x")


SAMPLE = [Sample("a", b"content", 3)]


def changed(place: int, by: bytes) -> bytes:
    """With this in its first header, and the checksum that fits."""
    data = bytearray(write_shard(SAMPLE))
    data[place : place + len(by)] = by
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it has no end"),
        (write_shard(SAMPLE)[:2048], "it has no end"),
        (write_shard(SAMPLE)[:515], "a file in it is cut off"),
        (gzip.compress(write_shard(SAMPLE)), "it has no end"),
        (bytes([1]) * 1024, "it is no tar of plain files at byte 0"),
        (changed(156, b"2"), "it is no tar of plain files at byte 0"),  # a symbolic link
        (changed(124, b"-0000000777"), "it is no tar of plain files at byte 0"),  # for ever
        (changed(124, b"77777777777"), "a file in it is cut off"),
        (changed(124, b"00000000009"), "invalid literal"),
        (changed(0, b"a.exe"), "it holds a file a.exe"),
        (changed(0, b"b.jpg"), "the label of a does not follow its image"),
        (write_shard(SAMPLE)[1024:], "the label of a does not follow its image"),
    ],
)
def test_what_is_no_shard_is_damaged(data: bytes, why: str) -> None:
    with pytest.raises(DataError, match=rf"The shard x is damaged \({why}"):
        read_shard(data, "x")


def by_tarfile(samples: list[Sample]) -> bytes:
    """As tarfile writes an archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            label = [] if sample.label is None else [("cls", str(sample.label).encode())]
            for extension, content in [(sample.extension, sample.content), *label]:
                header = tarfile.TarInfo(f"{sample.key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    return buffer.getvalue()


def test_stock_webdataset_reads_the_shards(ingested: Ingested) -> None:
    import webdataset

    urls = [
        str(ingested.store.path(f"datasets/{ingested.manifest.digest}/{shard.name}"))
        for shard in ingested.manifest.shards_of("train")
    ]
    assert len(urls) > 1
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls"))
    assert len(read) == ingested.manifest.splits["train"]
    assert all(image.size == (64, 64) and 0 <= label <= 9 for image, label in read)


def test_the_split_is_stratified_and_hangs_on_names_alone(source: Source) -> None:
    splits = split_by_hash(source)
    for split, expected in (("test", 1), ("train", 11)):
        labels = [sample.label for sample in splits[split]]  # type: ignore[index]
        assert [labels.count(label) for label in range(10)] == [expected] * 10
    shuffled = dataclasses.replace(source, images=tuple(reversed(source.images)))
    assert split_by_hash(shuffled) == splits


def test_ingestion_made_twice_is_byte_identical(source: Source, ingested: Ingested, tmp_path: Path) -> None:
    again = FolderStore(tmp_path / "again")
    ingest(source, again, shard_bytes=60_000)
    names = ingested.store.names("datasets/")
    assert names == again.names("datasets/")
    assert all(ingested.store.read(name) == again.read(name) for name in names)


def test_ingestion_of_what_is_there_writes_nothing(source: Source, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    first = ingest(source, store)
    before = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}
    assert ingest(source, store) == first
    assert before == {path: path.stat().st_mtime_ns for path in store.folder.rglob("*")}


def test_pixel_statistics_are_those_of_the_training_images(source: Source, ingested: Ingested) -> None:
    train = split_by_hash(source)["train"]
    pixels = (
        np.stack([np.asarray(Image.open(io.BytesIO(s.image.read()))) for s in train]).astype(np.float64) / 127.5 - 1
    )
    np.testing.assert_allclose(ingested.manifest.images.mean, pixels.mean(axis=(0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(ingested.manifest.images.std, pixels.std(axis=(0, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("damage", ["not a jpeg", "cut", "wrong size"])
def test_an_image_that_does_not_decode_leaves_no_dataset(source: Source, tmp_path: Path, damage: str) -> None:
    first = source.images[0]
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "JPEG")
    jpeg = {"not a jpeg": b"hello", "cut": first.read()[:200], "wrong size": image.getvalue()}[damage]
    changed = dataclasses.replace(first, sha256=hashlib.sha256(jpeg).hexdigest(), read=lambda: jpeg)
    bad = dataclasses.replace(source, images=(changed, *source.images[1:]))
    store = FolderStore(tmp_path)
    with pytest.raises(DataError, match=first.file_name.removesuffix(".jpg")):
        ingest(bad, store)
    assert not [name for name in store.names("") if name.endswith("manifest.json")]


def test_decoding_averages_down_by_whole_blocks() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2] = 200
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=100, subsampling=0)
    whole, small = (decode(Sample("x", data.getvalue(), 0), RGB_SPEC, size).astype(float) for size in (64, 32))
    assert small.shape == (32, 32, 3)
    assert np.abs(small - whole.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))).max() <= 0.5
    assert np.abs(small - 100).max() <= 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_shard_is_found_and_named(
    ingested: Ingested, tmp_path: Path, position: int, bit: int
) -> None:
    shard = ingested.manifest.shards_of("train")[0]
    name = f"datasets/{ingested.manifest.digest}/{shard.name}"
    data = bytearray(ingested.store.read(name))
    data[position % len(data)] ^= 1 << bit
    damaged = FolderStore(tmp_path / "damaged")
    damaged.write(name, bytes(data))
    with pytest.raises(DataError, match=rf"{shard.name} is damaged.*Delete datasets/"):
        ShardImages(damaged, ingested.manifest, "train", 64, tmp_path / "copies").shard(0)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_in_a_manifest_is_never_trained_on_unnoticed(
    ingested: Ingested, position: int, value: int
) -> None:
    """Either the manifest is refused, or it still says the same (a line end became a space)."""
    name = layout.manifest(ingested.manifest.digest)
    data = bytearray(ingested.store.read(name))
    position %= len(data)
    if data[position] == value:
        return
    data[position] = value
    try:
        changed = parse_manifest(bytes(data), name)
    except DataError:
        return
    assert changed == ingested.manifest


def test_the_loader_gives_the_samples_of_the_order(source: Source, ingested: Ingested, tmp_path: Path) -> None:
    images = ShardImages(ingested.store, ingested.manifest, "train", 32, tmp_path)
    order = Order(tuple(shard.samples for shard in images.shards), 2, seed=0)
    pixels, labels = images.take(*order.at(5, 20))
    for row, (shard, place) in enumerate(zip(*order.at(5, 20), strict=True)):
        name = f"datasets/{ingested.manifest.digest}/{images.shards[shard].name}"
        sample = read_shard(ingested.store.read(name), name)[place]
        assert sample.label == labels[row]
        assert np.array_equal(decode(sample, ingested.manifest.images, 32), pixels[row])


def test_the_loader_keeps_no_more_than_its_bound(ingested: Ingested, tmp_path: Path) -> None:
    one = ShardImages(ingested.store, ingested.manifest, "train", 64, tmp_path, memory_bytes=0)
    shards = [one.shard(index)[0] for index in range(len(one.shards))]
    assert len(one._decoded) == 1
    everything = ShardImages(ingested.store, ingested.manifest, "train", 64, tmp_path)
    assert all(np.array_equal(everything.shard(i)[0], images) for i, images in enumerate(shards))
    assert len(everything._decoded) == len(shards)


def test_what_is_in_use_is_decoded_once_however_large_it_is(
    ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ShardImages(ingested.store, ingested.manifest, "train", 64, tmp_path, memory_bytes=1)
    decoded: list[int] = []
    decode_shard = images._decode

    def counted(index: int) -> tuple[Images, Labels]:
        decoded.append(index)
        return decode_shard(index)

    monkeypatch.setattr(images, "_decode", counted)
    assert len(images.shards) >= 4
    images.prepare([2], in_use=[0, 1])
    for shards in ([0, 1, 0], [1, 0, 1], [1, 2, 2]):  # the last batch begins the next window
        images.take(np.array(shards), np.array([0, 1, 2]))
    images.prepare([0], in_use=[2])
    images.take(np.array([2]), np.array([0]))
    images.prepare([1], in_use=[0])
    images.take(np.array([0, 0]), np.array([0, 1]))
    images.take(np.array([1]), np.array([0]))
    assert sorted(decoded) == [0, 1, 2]
    images.prepare([], in_use=[1])
    images.shard(3)
    assert sorted(images._decoded) == [1, 3], "what is neither in use nor next is gone once another one comes"


def test_prefetching_keeps_the_order_and_passes_errors_on() -> None:
    assert list(prefetch(lambda i: i * i, 3, 10, ahead=4)) == [i * i for i in range(3, 10)]
    assert list(prefetch(lambda i: i, 5, 5)) == []

    def fails(index: int) -> int:
        if index == 2:
            raise DataError("shard 2 is damaged")
        return index

    made = prefetch(fails, 0, 5)
    assert list(itertools.islice(made, 2)) == [0, 1]
    with pytest.raises(DataError, match="shard 2"):
        next(made)


def test_a_store_lists_reads_and_replaces(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "new"))
    assert store.names("") == []
    store.write("a/b/c", b"1")
    store.write("a/bc", b"2")
    store.write("a/b/c", b"3")
    assert store.names("a/b") == ["a/b/c", "a/bc"]
    assert store.read("a/b/c") == b"3"
    store.delete("a/b/c")
    store.delete("a/b/c")
    with pytest.raises(KeyError):
        store.read("a/b/c")
    with pytest.raises(StoreError, match="neither a folder nor s3"):
        open_store("ftp://somewhere")


def test_a_store_that_can_t_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match=r"can't be written.*TRAIN_DIFFUSION_STORE"):
        check_writable(FolderStore(tmp_path / "file" / "store"))


def test_a_write_that_fails_half_way_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut, too, and stay so
    store = FolderStore(tmp_path)
    store.write("a/b", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # files end there, as on a full disk
    try:
        with pytest.raises(StoreError, match="can't be written"):
            store.write("a/b", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.read("a/b") == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_manifest_of_another_format_is_refused(ingested: Ingested) -> None:
    fields = json.loads(ingested.manifest.to_json())
    del fields["checksum"]
    other = Manifest.model_validate(fields | {"format_version": 99})
    with pytest.raises(DataError, match="format 99"):
        parse_manifest(other.to_json(), "x")
    lying = Manifest.model_validate(fields | {"splits": {"train": 7, "test": 10}})
    with pytest.raises(DataError, match="contradicts"):
        parse_manifest(lying.to_json(), "x")


def test_the_manifest_names_every_shard_by_its_digest(ingested: Ingested) -> None:
    for shard in ingested.manifest.shards:
        data = ingested.store.read(f"datasets/{ingested.manifest.digest}/{shard.name}")
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)


def test_creating_leaves_another_s_object_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    assert store.create("a/b", b"mine")
    assert store.create("a/b", b"mine"), "the same again is no conflict"
    assert not store.create("a/b", b"another's")
    assert store.read("a/b") == b"mine"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
