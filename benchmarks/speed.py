"""How fast the parts are beside what else one could use. A ratio above 1 means that ours is faster, or waits less.

    python -m benchmarks.speed --out FOLDER [--only steps,loader]

Images are EuroSAT's. Ours and theirs run as a rank on a CPU does: torch and numpy have one thread, and the memory of large
tensors is kept; loader and ingestion have their own threads. FLOPs are those of the networks' passes, which are alike, not equal:
the optimiser's and the average's work takes time and counts for nothing.
Writes `speed.json` and `speed.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
import webdataset
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from benchmarks import peers
from benchmarks.cost import speed
from benchmarks.peers import Work
from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.order import Order
from diffusion.data.sources.find import EUROSAT, find_archive, read_source
from diffusion.denoiser import Denoiser, build_network
from diffusion.evaluation.statistics import Moments, frechet_distance
from diffusion.model.flops import BACKWARD, forward_flops
from diffusion.model.placement import place
from diffusion.pixels import Pixels
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.training.batches import Batches
from diffusion.training.loop import CheckpointWriter, state_of
from diffusion.training.trainer import Trainer
from flows.engines.cores import TUNABLES, computing_variables

WARM = 2
SAMPLES, STEPS = 64, 20
Row = dict[str, float]
Rows = Iterator[tuple[str, Row]]


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    archive: Path
    store: FolderStore
    dataset: Manifest
    folder: Path
    rounds: int
    seconds: float
    """Of each turn."""

    def in_turns(self, ours: Work, theirs: Work, unit: str, scale: float = 1.0) -> Row:
        """The rate of each, and the median of the ratios of neighbours."""
        rates: list[list[float]] = [[], []]
        for round_ in range(self.rounds + 1):
            for index, one in enumerate((ours, theirs)):
                began, times = time.perf_counter(), 0
                while times < (WARM if round_ == 0 else 1) or time.perf_counter() - began < self.seconds:
                    one.once()
                    times += 1
                if round_:  # the first one warms up
                    rates[index].append(times * one.amount / (time.perf_counter() - began) / scale)
        ratios = [mine / other for mine, other in zip(*rates, strict=True)]
        mine, other = map(statistics.median, rates)
        return {f"ours, {unit}": mine, f"theirs, {unit}": other, "ratio": statistics.median(ratios)}

    def trainer(self, size: int, batch: int) -> tuple[Trainer, Batches]:
        """The demo's network and optimiser at that size."""
        recipe = load_recipe("demo", {"data.image_size": size, "data.batch_size": batch, "data.lanes": 1})
        trainer = Trainer(recipe, self.dataset, Accelerator(cpu=True), self.store)
        return trainer, Batches(recipe, self.images(size), trainer.lanes)

    def images(self, size: int) -> ShardImages:
        """The training images, none of them decoded yet."""
        return ShardImages(self.store, self.dataset, "train", size, self.folder / "copies")


def peak(seconds: float) -> float:
    """GFLOP/s of a product of two large matrices: what one thread of this machine can do at most, about."""
    matrix = torch.randn(1024, 1024)
    torch.mm(matrix, matrix)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - began) / 1e9


def steps(bench: Bench) -> Rows:
    """Training steps with optimiser and average, of a batch in memory."""
    most = peak(bench.seconds)
    for size in (32, 64):
        for batch in (16, 64):
            trainer, batches = bench.trainer(size, batch)
            flops = batch * (1 + BACKWARD) * forward_flops(trainer.network, 3, size)
            ours = Work(partial(trainer.train_step, batches(0)), flops)
            for library, step in ((peers.DIFFUSERS, peers.diffusers_step), (peers.DENOISING, peers.denoising_step)):
                row = bench.in_turns(ours, step(size, batch), "GFLOP/s", 1e9)
                row["share of a matrix product's GFLOP/s"] = row["ours, GFLOP/s"] / most
                yield f"a step of {batch} images of {size} x {size}, against {library}", row


def sampling(bench: Bench) -> Rows:
    """From noise to bytes."""
    recipe = load_recipe("demo", {"evaluation.sampler_steps": STEPS, "evaluation.guidance": 1.0})
    network = place(build_network(recipe, bench.dataset.images).eval().requires_grad_(False), torch.device("cpu"))
    denoiser = Denoiser(recipe, network, Pixels(bench.dataset.images))
    ours = Work(lambda: denoiser.sample(range(SAMPLES), np.arange(SAMPLES) % 10, 0), SAMPLES)
    row = bench.in_turns(ours, peers.diffusers_samples(32, SAMPLES, STEPS), "samples/s")
    yield f"{SAMPLES} samples of 32 x 32 in {STEPS} steps of DPM-Solver++, against {peers.DIFFUSERS}", row


def loader(bench: Bench) -> Rows:
    """64 x 64, as they lie in the shards."""
    shards = [bench.store.folder / layout.dataset(bench.dataset.digest) / one.name for one in bench.images(64).shards]
    raw = [sample["jpg"] for sample in webdataset.WebDataset([str(shards[0])], shardshuffle=False, empty_check=False)]
    decoded = Work(lambda: bench.images(64).shard(0), len(raw))
    with ThreadPoolExecutor() as pool:  # as ours has
        alone = Work(lambda: [*pool.map(lambda content: np.asarray(Image.open(io.BytesIO(content))), raw)], len(raw))
        row = bench.in_turns(decoded, alone, "images/s")
    yield "loader, first epoch: a shard read, checked and decoded, against decoding it with Pillow", row

    images = bench.images(64)
    order = Order(tuple(shard.samples for shard in images.shards), 8, seed=0)
    for index in range(len(images.shards)):
        images.shard(index)
    places = (order.at(16 * number, 16) for number in range(10**9))
    ours = Work(lambda: images.take(*next(places)), 16)
    stock = iter(
        webdataset.DataPipeline(
            webdataset.ResampledShards([str(shard) for shard in shards]),
            webdataset.tarfile_to_samples(),
            webdataset.shuffle(1000),
            webdataset.decode("torchrgb"),
            webdataset.to_tuple("jpg", "cls"),
            webdataset.batched(16),
        )
    )
    row = bench.in_turns(ours, Work(lambda: next(stock), 16), "images/s")
    yield "loader, later epochs: 16 images in random order, against stock webdataset", row
    folder = bench.folder / "classes"
    with zipfile.ZipFile(bench.archive) as archive:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][::27]:
            where = folder / Path(name).parent.name
            where.mkdir(parents=True, exist_ok=True)
            (where / Path(name).name).write_bytes(archive.read(name))
    files = torch.utils.data.DataLoader(Files(folder), batch_size=16, shuffle=True, drop_last=True)
    endless = (batch for _ in iter(int, 1) for batch in files)
    yield (
        "the same, against DataLoader and a file an image",
        bench.in_turns(ours, Work(lambda: next(endless), 16), "images/s"),
    )


class Files(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """A file an image, in a folder a class."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*/*.jpg"))
        self.classes = sorted({file.parent.name for file in self.files})

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(Image.open(self.files[index]))).permute(2, 0, 1) / 255
        return image, self.classes.index(self.files[index].parent.name)


def ingestion(bench: Bench) -> Rows:
    """Against what nobody can do without: each file read once, and hashed."""

    def read() -> None:
        with zipfile.ZipFile(bench.archive) as archive:
            for name in archive.namelist():
                hashlib.sha256(archive.read(name)).hexdigest()

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=bench.folder) as fresh:
            ingest(read_source(EUROSAT, bench.archive), FolderStore(Path(fresh)))

    pairs = [(seconds(whole), seconds(read)) for _ in range(2)]
    row = dict(zip(("ours, s", "theirs, s"), map(min, zip(*pairs, strict=True)), strict=True))
    yield (
        "ingestion of EuroSAT, against reading its zip and hashing",
        row | {"ratio": row["theirs, s"] / row["ours, s"]},
    )


def distance(bench: Bench) -> Rows:
    """Of 2,048 features, as Inception has."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((2048, 2048)) / 45
    first, second = (
        Moments.of(((rng.standard_normal((4096, 2048)) + shift) @ mixed).astype(np.float32)) for shift in (0, 0.1)
    )
    _ = second.root  # one of the two stays in a series

    def theirs() -> float:
        root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
        means = np.square(first.mean - second.mean).sum()
        return float(means + np.trace(first.covariance) + np.trace(second.covariance) - 2 * np.trace(root))

    apart = abs(frechet_distance(first, second) / theirs() - 1)
    row = {
        "ours, s": seconds(lambda: frechet_distance(first, second)),
        "theirs, s": seconds(theirs),
        "relative difference": apart,
    }
    yield (
        "FID of 2,048 features, the reference's root kept, against scipy's root",
        row | {"ratio": row["theirs, s"] / row["ours, s"]},
    )


def checkpoints(bench: Bench) -> Rows:
    """How long the loop stands still; ours is written while it goes on."""
    trainer, batches = bench.trainer(32, 16)
    trainer.train_step(batches(0))
    writer = CheckpointWriter(FolderStore(bench.folder / "checkpoints"), bench.folder)
    accelerator = Accelerator(cpu=True)
    network = accelerator.prepare(build_network(trainer.recipe, bench.dataset.images))
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters()))
    average: dict[str, Tensor] = {name: value.clone() for name, value in network.state_dict().items()}
    network(torch.randn(2, 3, 32, 32), torch.rand(2, dtype=torch.float64), None).mean().backward()
    optimizer.step()

    class Average:
        def state_dict(self) -> dict[str, Any]:
            return average

        def load_state_dict(self, state: dict[str, Any]) -> None:
            average.update(state)

    accelerator.register_for_checkpointing(Average())
    state, ours, theirs = state_of(trainer, "speed", bench.dataset.digest), [], []
    for _ in range(max(5, bench.rounds)):
        ours.append(seconds(lambda: writer.save(trainer, state, b"")))
        writer.wait()
        theirs.append(seconds(lambda: accelerator.save_state(str(bench.folder / "saved"))))
    row = {"ours, ms": 1000 * statistics.median(ours), "theirs, ms": 1000 * statistics.median(theirs)}
    yield "a checkpoint's stall, against accelerate.save_state", row | {"ratio": row["theirs, ms"] / row["ours, ms"]}


def jobs(bench: Bench) -> Rows:
    """A whole training job against the bare loop, and on two processes against one, each on a core of its own."""
    recipe = load_recipe("demo", {"data.images": 2048})
    trainer = Trainer(recipe, bench.dataset, Accelerator(cpu=True), bench.store)
    lanes = Batches(recipe, bench.images(32), trainer.lanes)(0)
    cores, bare, rates = sorted(os.sched_getaffinity(0)), list[float](), {1: list[float](), 2: list[float]()}
    for _ in range(max(1, bench.rounds // 2)):
        for processes in (1, 2)[: len(cores)]:
            os.sched_setaffinity(0, cores[:processes])
            # Of a name of its own: a run that is there already would only be found.
            with tempfile.TemporaryDirectory(dir=bench.folder) as fresh:
                rates[processes].append(speed(recipe, bench.dataset, bench.store, Path(fresh), processes))
        os.sched_setaffinity(0, cores[:1])
        for _ in range(32):  # as the job's figure is that of its second half
            trainer.train_step(lanes)
        bare.append(64 * 16 / seconds(lambda: [trainer.train_step(lanes) for _ in range(64)]))
    os.sched_setaffinity(0, cores)
    alone, one = statistics.median(bare), statistics.median(rates[1])
    job = {"ours, images/s": one, "theirs, images/s": alone, "ratio": one / alone}
    yield "a training job, against its steps on a batch in memory", job
    if rates[2]:
        two = statistics.median(rates[2])
        yield "a second process, on a core of its own", {"one, images/s": one, "two, images/s": two, "ratio": two / one}


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, once."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


PARTS: dict[str, Callable[[Bench], Rows]] = {
    part.__name__: part for part in (steps, sampling, loader, ingestion, distance, checkpoints, jobs)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, commas between")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    if TUNABLES not in os.environ:  # it is read as a process starts
        os.execve(sys.executable, sys.orig_argv, os.environ | computing_variables(1))  # noqa: S606
    torch.set_num_threads(1)
    peers.install()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Row] = {}
    archive = find_archive(EUROSAT, settings())
    with tempfile.TemporaryDirectory() as scratch:
        store = FolderStore(Path(scratch) / "store")
        dataset = ingest(read_source(EUROSAT, archive), store)
        bench = Bench(archive, store, dataset, Path(scratch), arguments.rounds, arguments.seconds)
        for part in parts:
            for name, row in PARTS[part](bench):
                rows[name] = row
                print(name, row, flush=True)
    (arguments.out / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["| what | ratio | measured |", "| --- | --- | --- |"]
    for name, row in rows.items():
        measured = ", ".join(f"{key} {value:.3g}" for key, value in row.items() if key != "ratio")
        lines.append(f"| {name} | {row['ratio']:.2f} | {measured} |")
    table = "\n".join(lines) + "\n"
    (arguments.out / "speed.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
