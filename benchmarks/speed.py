"""How fast a training step is beside another library's, and what a second process gives; ours and theirs take turns in one run.

    python -m benchmarks.speed --out FOLDER

The other library comes into var/peers, over the packages that are here. One thread a process, as the product has it on CPUs. FLOPs
are counted, forward and backward, by PyTorch's counter: the networks are alike, not equal. The optimiser's and the average's work
takes time and counts for nothing. Writes `speed.json` and `speed.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost import speed
from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.sources import generated
from diffusion.data.sources.eurosat import read_archive
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store.objects import FolderStore, Store
from diffusion.training.batches import Batches
from diffusion.training.trainer import Trainer

PEER = "diffusers==0.42.1"
WARM = 2


@dataclass(frozen=True)
class Stepper:
    """A training that can be asked for one step more."""

    step: Callable[[], Any]
    flops: float
    """Of a step: forward and backward."""


def peers() -> None:
    """Have the other library importable."""
    folder = settings().home / "peers"
    if not (folder / "diffusers").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
        subprocess.run(command, check=True)
    sys.path.append(str(folder))


def counted(step: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def ours(dataset: Manifest, store: Store, folder: Path, size: int, batch: int) -> Stepper:
    """The demo's network and optimiser at that size, on a batch in memory."""
    recipe = load_recipe("demo", {"data.image_size": size, "data.batch_size": batch, "data.lanes": 1})
    trainer = Trainer(recipe, dataset, Accelerator(cpu=True), store)
    lanes = Batches(recipe, ShardImages(store, dataset, "train", size, folder), trainer.lanes)(0)
    step = lambda: trainer.train_step(lanes)  # noqa: E731
    return Stepper(step, counted(step))


def theirs(size: int, batch: int) -> Stepper:
    """A network of the same widths and levels with attention in the same place, AdamW, and the library's own average."""
    import diffusers  # type: ignore[import-not-found]
    from diffusers.training_utils import EMAModel  # type: ignore[import-not-found]

    network = diffusers.UNet2DModel(
        sample_size=size,
        block_out_channels=(24, 48, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=3,
        attention_head_dim=24,
        num_class_embeds=11,
    )
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    optimizer, average = torch.optim.AdamW(network.parameters(), 1e-3), EMAModel(network.parameters())
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))

    def step() -> None:
        noise, times = torch.randn_like(images), torch.randint(0, 1000, (batch,))
        said = network(scheduler.add_noise(images, noise, times), times, class_labels=labels).sample
        torch.nn.functional.mse_loss(said, scheduler.get_velocity(images, noise, times)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return Stepper(step, counted(step))


def peak(seconds: float) -> float:
    """GFLOP/s of a product of two large matrices: what one thread of this machine can do at most, about."""
    matrix = torch.randn(1024, 1024)
    torch.mm(matrix, matrix)
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        torch.mm(matrix, matrix)
        products += 1
    return products * 2 * 1024**3 / (time.perf_counter() - began) / 1e9


def in_turns(first: Stepper, second: Stepper, rounds: int, seconds: float) -> dict[str, float]:
    """GFLOP/s of each, and the median of the ratios of neighbours."""
    rates: list[list[float]] = [[], []]
    for round_ in range(rounds + 1):
        for index, one in enumerate((first, second)):
            began, steps = time.perf_counter(), 0
            while steps < WARM or time.perf_counter() - began < seconds:
                one.step()
                steps += 1
            if round_:  # the first one warms up
                rates[index].append(steps * one.flops / (time.perf_counter() - began) / 1e9)
    ratios = [mine / other for mine, other in zip(*rates, strict=True)]
    mine, other = map(statistics.median, rates)
    return {"ours, GFLOP/s": mine, "theirs, GFLOP/s": other, "ratio": statistics.median(ratios)}


def second_process(dataset: Manifest, store: Store, folder: Path, rounds: int) -> dict[str, float]:
    """Images a second of the demo's training on one core, and on two with a process each."""
    recipe, rates = load_recipe("demo", {"data.images": 2048}), {1: [0.0], 2: [0.0]}
    cores = sorted(os.sched_getaffinity(0))[:2]
    for _ in range(rounds):
        for processes, found in rates.items():
            os.sched_setaffinity(0, cores[:processes])
            # Of a name of its own: a run that is there already would only be found.
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                found.append(speed(recipe, dataset, store, Path(fresh), processes))
            os.sched_setaffinity(0, cores)
    one, two = statistics.median(rates[1][1:]), statistics.median(rates[2][1:])
    return {"one process, images/s": one, "two processes, images/s": two, "ratio": two / one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peers()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = {}
    most = peak(arguments.seconds)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        archive = generated.write_archive(folder / "generated.zip", images_per_class=24)
        store = FolderStore(folder / "store")
        dataset = ingest(read_archive(archive, generated.NAME, generated.LICENCE), store)
        for size in (32, 64):
            for batch in (16, 64):
                pair = ours(dataset, store, folder / "copies", size, batch), theirs(size, batch)
                row = in_turns(*pair, arguments.rounds, arguments.seconds)
                row["share of a matrix product's GFLOP/s"] = row["ours, GFLOP/s"] / most
                rows[f"a step of {batch} images of {size} x {size}, against {PEER}"] = row
        if len(os.sched_getaffinity(0)) > 1:
            rows["a second process"] = second_process(dataset, store, folder, max(1, arguments.rounds // 2))
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
