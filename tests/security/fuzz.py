"""What reads, given what nobody meant to write: `python -m tests.security.fuzz [--seconds 600] [TARGET …]`.

Each target has files as they should be. They are changed, cut, doubled and mixed; what comes out is an answer or a UserError, and
nothing else. What escapes is kept, with its path, and raised.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import tifffile
from PIL import Image

from diffusion.data import codecs
from diffusion.data.ingest import ingest
from diffusion.data.manifest import parse_manifest
from diffusion.data.sealed import CHECKSUM, checksum, seal
from diffusion.data.shards import decode, read_shard
from diffusion.data.sources import generated
from diffusion.data.sources.eurosat import read_archive
from diffusion.data.sources.files import read_files
from diffusion.data.sources.own import read_own
from diffusion.data.sources.source import AS_IT_IS, parse_options
from diffusion.data.sources.tables import read_parquet, read_webdataset
from diffusion.data.spec import ImageSpec
from diffusion.errors import UserError
from diffusion.evaluation.scores import find_scores
from diffusion.recipe_files import load_recipe
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.tracking.promotion_log import past_champions
from diffusion.training.journal import COMMITTED, JOURNAL, Journal, committed_step, records
from diffusion.training.state import FORMAT_VERSION as STATE_FORMAT
from diffusion.training.state import CheckpointState, load_state
from flows.engines.placement import parse_range
from flows.owner import read_owner
from flows.plugins.deployment import name_position
from flows.submission import parameters_of
from tests.scores import made
from tests.specs import RGB_SPEC

TOKENS = (
    b"null", b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b'""', b"[]", b"{}", b"[[[[", b"../..", b"\x00", b"\xff\xfe",
    b"\r\n", b"true", b"!!python/object:os.system", b"&a *a", b"\x1b[31m", b"/" * 300, b"\n", b",", b":", b'"', b"}", b"]",
)  # fmt: skip
"""What text formats trip over."""


LONGEST = 60
"""Seconds that one reading may take, on a busy machine: they take milliseconds."""


@dataclass(frozen=True)
class Target:
    """Something that reads."""

    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    """Raises a UserError, or returns."""
    mark: bytes = b""
    """What its records begin with."""


def mutate(target: Target, rng: random.Random) -> bytes:
    """One of the files: some bytes changed, most of them near its ends and records; cut, doubled, or mixed with another."""
    changed = bytearray(rng.choice(target.seeds))
    marks = [found.start() for found in re.finditer(re.escape(target.mark), changed)] if target.mark else [0]
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        size = len(changed)
        # The heads of files and of what lies in them hold what readers trust.
        record, end = rng.choice(marks) + rng.randrange(60), max(0, size - rng.randrange(1, 200))
        at = min(size, rng.choice((rng.randrange(size + 1), record, end)))
        kind = rng.random()
        if kind < 0.5 and at < size:
            changed[at] = rng.choice((rng.randrange(256), 0, 255, changed[at] ^ (1 << rng.randrange(8))))
        elif kind < 0.7:
            changed[at:at] = rng.choice(TOKENS)
        elif kind < 0.8:
            length = rng.randrange(1, 64)
            changed[at:at] = changed[max(0, at - length) : at]
        elif kind < 0.9:
            del changed[at : at + rng.randrange(1, 64)]
        elif kind < 0.95:
            other = rng.choice(target.seeds)
            cut = rng.randrange(len(other) + 1)
            changed[at:] = other[cut:]
        else:
            del changed[at:]
    return bytes(changed)


def targets(folder: Path) -> dict[str, Target]:
    """All of them; they work in a folder of their own."""
    archive = generated.write_archive(folder / "small.zip", images_per_class=12)
    source, store = read_archive(archive, "Small", "none"), FolderStore(folder / "store")
    manifest = ingest(source, store, shard_bytes=20_000)
    shards = tuple(store.read(f"datasets/{manifest.digest}/{shard.name}") for shard in manifest.shards[:2])
    files = [read() for _, read in read_files(archive)][:3]

    def through(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def of(content: bytes) -> object:
            path = folder / name
            path.write_bytes(content)
            return read(path)

        return of

    def all_of(path: Path) -> list[bytes]:
        return [image.read() for image in read_own(path, AS_IT_IS).images]

    table = pyarrow.table({"image": [{"bytes": file, "path": None} for file in files], "label": [0, 1, 0]})
    pyarrow.parquet.write_table(table, folder / "seed.parquet")
    array = np.random.default_rng(0).integers(0, 4000, (8, 8, 5), dtype=np.uint16)
    tiffs = [io.BytesIO() for _ in ("zlib", "lzw", "zstd")]
    for tiff, packed in zip(tiffs, ("zlib", "lzw", "zstd"), strict=True):
        tifffile.imwrite(tiff, array, photometric="minisblack", planarconfig="contig", compression=packed)
    npy = io.BytesIO()
    np.save(npy, array)
    pictures = [*(tiff.getvalue() for tiff in tiffs), npy.getvalue()]
    for kind in ("JPEG", "PNG", "WEBP"):
        data = io.BytesIO()
        Image.fromarray((array[..., :3] // 16).astype(np.uint8)).save(data, kind)
        pictures.append(data.getvalue())
    recipe = load_recipe("demo")
    yaml = Path(sys.modules["diffusion"].__path__[0], "presets", "demo.yaml").read_bytes()
    state = seal(
        CheckpointState(
            format_version=STATE_FORMAT,
            run="r",
            step=8,
            images_seen=128,
            dataset="d" * 64,
            recipe=recipe,
            sha256={"x": "e" * 64},
        )
    )
    journal = b"".join(json.dumps({"step": step, "kind": "metrics", "loss": 0.5}).encode() + b"\n" for step in range(9))
    scores = seal(made())

    def at(name: str, read: Callable[[], object]) -> Callable[[bytes], object]:
        def of(content: bytes) -> object:
            store.write(name, content)
            return read()

        return of

    def sealed(read: Callable[[bytes], object]) -> Callable[[bytes], object]:
        """As it is, which a seal tells; and with a seal that fits, as whoever may write anything makes it."""

        def of(content: bytes) -> object:
            try:
                fields = {key: value for key, value in json.loads(content).items() if key != CHECKSUM}
            except (ValueError, AttributeError, RecursionError):
                return read(content)
            return read(json.dumps({**fields, CHECKSUM: checksum(fields)}).encode())

        return of

    def read_journal(content: bytes) -> None:
        (folder / JOURNAL).write_bytes(content)
        (folder / COMMITTED).write_bytes(content)
        assert all(type(record["step"]) is int for record in records(content))
        Journal(folder / JOURNAL).drop_after(5)
        committed_step(folder)

    def read_images(content: bytes) -> None:
        for sample in read_shard(content, "x"):
            decode(sample, RGB_SPEC, 16)

    def override(content: bytes) -> object:
        keys, _, value = content.decode(errors="replace").partition("=")
        return load_recipe("demo", {keys: value})

    def spec(content: bytes) -> object:
        try:
            return ImageSpec.model_validate_json(content)
        except ValueError:  # pydantic's: whoever reads one turns it into its own
            return None

    def options(content: bytes) -> object:
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            return None
        return parse_options(values) if isinstance(values, dict) else None

    argv = (b"prefect\0deployment\0run\0train-diffusion\0--watch\0-p\0preset=demo", b"-m\0prefect\0deployment\0run\0x")
    return {
        "zip": Target((archive.read_bytes(),), through("x.zip", lambda path: read_archive(path, "x", "y")), b"PK"),
        "tar": Target(shards, through("x.tar", all_of)),
        "webdataset": Target(shards, through("w.tar", lambda path: read_webdataset([path], "x", AS_IT_IS))),
        "parquet": Target(((folder / "seed.parquet").read_bytes(),), through("x.parquet", lambda p: read_parquet(p, AS_IT_IS))),
        "pictures": Target(tuple(pictures), lambda content: codecs.decode(content, "x")),
        "shard": Target(shards, read_images),
        "manifest": Target((store.read(layout.manifest(manifest.digest)),), sealed(lambda content: parse_manifest(content, "x"))),
        "spec": Target((RGB_SPEC.model_dump_json().encode(),), spec),
        "state": Target((state,), sealed(at("checkpoints/r/000000008/state.json", lambda: load_state(store, "r", 8)))),
        "scores": Target(
            (scores,), sealed(at(layout.scores('r', 8), lambda: find_scores(store, "r", 8, 750)))
        ),
        "promotions": Target(
            (b'{"from": null, "to": "1", "reason": "x", "gates": [{"name": "a", "passed": true, "figures": "b"}]}',),
            at("promotions/m/000000.json", lambda: past_champions(store, 10)),
        ),
        "journal": Target((journal, b'{"step": 8}\n'), read_journal),
        "recipe": Target((yaml,), through("mine.yaml", lambda path: load_recipe(str(path)))),
        "overrides": Target((b"network.width=96", b"ema.half_lives=[1, 2]", b"evaluation.extractors=[own]"), override),
        "options": Target((b'{"size": 64, "fit": "crop", "bands": ["a", "b"], "name": "x", "levels": [0, 1]}',), options),
        "processes": Target((b"2-8", b"4"), lambda content: parse_range(content.decode(errors="replace"))),
        "owner": Target((b'{"host": "h", "boot": "b", "pid": 1, "started": 0.0}',), lambda c: read_owner(c.decode(errors="replace"))),
        "argv": Target(argv, lambda content: name_position(content.decode(errors="replace").split("\0"))),
        "parameters": Target(
            (b'-p\0preset=demo\0--watch\0--param=seed=3\0--params\0{"seed": 1, "nights": "new data"}',),
            lambda content: parameters_of(content.decode(errors="replace").split("\0")),
        ),
    }  # fmt: skip


class Hangs(BaseException):
    """Not an Exception: what reads would take it for a decoder's."""


def _give_up(*_: object) -> None:
    raise Hangs(f"It takes more than {LONGEST} s.")


def fuzz(target: Target, rng: random.Random, goes_on: Callable[[int], bool], kept: Path) -> tuple[int, int]:
    """Try until told to end. Returns how many were tried, and how many refused. Raises whatever is no UserError, and what hangs."""
    before = signal.signal(signal.SIGALRM, _give_up)
    try:
        return _fuzz(target, rng, goes_on, kept)
    finally:
        signal.signal(signal.SIGALRM, before)


def _fuzz(target: Target, rng: random.Random, goes_on: Callable[[int], bool], kept: Path) -> tuple[int, int]:
    tried = refused = 0
    while goes_on(tried):
        content = mutate(target, rng)
        signal.alarm(LONGEST)
        try:
            target.read(content)
        except UserError:
            refused += 1
        except BaseException:
            kept.write_bytes(content)
            print(f"kept {kept}", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
        tried += 1
    return tried, refused


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what a library says of each of a million files
    here = Path(tempfile.mkdtemp(prefix="fuzz-"))
    known = targets(here)
    for name in arguments.targets or known:
        end = time.monotonic() + arguments.seconds

        def before_the_end(_: int, end: float = end) -> bool:
            return time.monotonic() < end

        counts = fuzz(known[name], random.Random(arguments.seed), before_the_end, here / name)
        print(f"{name:12} {counts[0]:9,} tried, {counts[1]:9,} refused, no other error", flush=True)
