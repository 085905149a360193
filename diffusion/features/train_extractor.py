"""Train a feature extractor: a classifier whose features samples are judged by.

    python -m diffusion.features.train_extractor --archive EuroSAT.zip    the one that comes with the package
    python -m diffusion.features.train_extractor FOLDER                   a dataset's own, as a job

The first takes about 20 minutes on 2 CPU cores. What is stored are fused weights as float16 safetensors, and the accuracy that
those very weights reach on the test split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Read when torch is loaded. Its threads wait for each other after every small operation, by default without giving their
    # cores up: where others kept those busy, a dataset's own extractor took five times as long. Where nobody did, it made no
    # difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest, Split, require_dataset
from diffusion.data.sealed import seal
from diffusion.data.sources.eurosat import read_eurosat
from diffusion.features.classifier import Classifier, fuse
from diffusion.features.identity import SHIPPED_WEIGHTS, OwnExtractor, find_own
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import ExtractorJob
from diffusion.model.placement import place
from diffusion.pixels import Pixels
from diffusion.store import layout
from diffusion.store.objects import FolderStore, Store, open_store

EPOCHS = 14
BATCH = 128
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
HALF_RESOLUTION_SHARE = 0.3
OWN_IMAGES = 20_000
"""Of a split, by which a dataset's own extractor is trained, and tested."""
OWN_BUDGET, OWN_EPOCHS = 40_000, 40
"""Images that it sees in all, and how often each of them at most: two minutes on two cores."""
VIEW_OUTPUTS = 64
"""Dimensions in which views of one image are drawn together."""
TEMPERATURE = 0.2
SMALLEST_PART = 0.35  # of an image's side
JITTER = 0.2  # of the bands' brightness, in their standard deviations


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """One random symmetry of the square for each image, and half the resolution for some: recipes of half the size are scored too."""
    choice = torch.randint(8, (len(images),), generator=rng)
    out = images.clone()
    for symmetry in range(8):
        chosen = images[choice == symmetry]
        turned = torch.rot90(chosen, symmetry % 4, (2, 3))
        out[choice == symmetry] = turned.flip(3) if symmetry >= 4 else turned
    return coarsen(out, rng)


def coarsen(out: Tensor, rng: torch.Generator) -> Tensor:
    """The images, some of them at half the resolution."""
    coarse = torch.rand(len(out), generator=rng) < HALF_RESOLUTION_SHARE
    if coarse.any():
        out[coarse] = F.interpolate(F.avg_pool2d(out[coarse], 2), size=out.shape[-2:], mode="bilinear")
    return out


@torch.no_grad()
def accuracy(network: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of correct classes."""
    right = sum(
        int((network(batch).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


Data = tuple[Tensor, Tensor]
"""Images [n, bands, height, width] and labels [n]."""
Loss = Callable[[Classifier, Tensor, Tensor, torch.Generator], Tensor]
"""Of a network, on the images and labels of a batch, with draws of its own."""


def fit(
    train: Data,
    classes: int,
    epochs: int,
    device: torch.device,
    loss_of: Loss,
    told: Callable[[int, float], None],
) -> Classifier:
    """A classifier of these images, fused, its weights rounded to float16 as they are stored.

    Args:
        loss_of: what it is to learn.
        told: called after each epoch with its number and mean loss.
    """
    images, labels = train
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    network = place(Classifier(images.shape[1], classes, fused=False), device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = min(BATCH, len(images))
    steps_per_epoch = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(epochs):
        total = 0.0
        network.train()
        order = torch.randperm(len(images), generator=rng)
        for step in range(steps_per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            loss = loss_of(network, images[chosen], labels[chosen], rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        told(epoch + 1, total / steps_per_epoch)
    return fuse(network.eval().cpu()).half().float()


def tell_classes(network: Classifier, images: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """How far it is from telling the classes of images that were turned and mirrored."""
    said = network(_placed(network, augment(images, rng)))
    return F.cross_entropy(said, labels.to(said.device))


def tell_views(network: Classifier, images: Tensor, _: Tensor, rng: torch.Generator) -> Tensor:
    """How far it is from telling which two of twice as many views are of one image (Chen et al. 2020, arXiv:2002.05709, eq. 1)."""
    towards = F.normalize(network(_placed(network, torch.cat([view(images, rng), view(images, rng)]))), dim=1)
    alike = towards @ towards.T / TEMPERATURE
    own = torch.eye(len(towards), dtype=torch.bool, device=alike.device)
    other = torch.arange(len(towards), device=alike.device).roll(len(images))
    return F.cross_entropy(alike.masked_fill(own, -torch.inf), other)


def _placed(network: Classifier, images: Tensor) -> Tensor:
    return images.to(network.head.weight.device).contiguous(memory_format=torch.channels_last)


def view(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image as it might have been taken as well: a part of it, mirrored or not, each band brighter or darker; some coarser.

    Not turned: which way is up may matter.
    """
    count, bands = images.shape[:2]
    scale = SMALLEST_PART + (1 - SMALLEST_PART) * torch.rand(count, generator=rng)
    across, down = (1 - scale) * (2 * torch.rand(2, count, generator=rng) - 1)
    mirror = 1 - 2 * (torch.rand(count, generator=rng) < 0.5).float()
    none = torch.zeros(count)
    where = torch.stack([scale * mirror, none, across, none, scale, down], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    part = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, shift = JITTER * torch.randn(2, count, bands, 1, 1, generator=rng)
    return coarsen(part * torch.exp(gain) + shift, rng)


@torch.no_grad()
def views_told(network: Classifier, images: Tensor) -> tuple[float, float]:
    """Share of images, of as many as a batch has, whose other view is the most alike; and what guessing would reach."""
    images, rng = images[:BATCH], torch.Generator().manual_seed(1)
    first, second = (F.normalize(network(view(images, rng)), dim=1) for _ in range(2))
    told = (first @ second.T).argmax(dim=1) == torch.arange(len(images))
    return float(told.float().mean()), 1 / len(images)


def train_own(job: ExtractorJob, rank: Rank) -> None:
    """Train a dataset's own extractor, and store it: to tell its classes or, where it has none, views of one image from others'."""
    store, accelerator = open_store(job.store), rank.accelerator
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    dataset = require_dataset(store, job.dataset)
    classes = len(dataset.images.classes)
    labelled = classes > 1
    train, test = (_read(store, dataset, split, job.shard_copies) for split in ("train", "test"))
    loss, outputs, looks = (tell_classes, classes, 1) if labelled else (tell_views, VIEW_OUTPUTS, 2)
    epochs = max(1, min(OWN_EPOCHS, OWN_BUDGET // looks // len(train[0])))

    def told(epoch: int, mean: float) -> None:
        progress.write("training the extractor", epoch, epochs, f"epoch {epoch} of {epochs}, loss {mean:.3f}")

    network = fit(train, outputs, epochs, accelerator.device, loss, told)
    if labelled:
        right, chance = accuracy(network, *test), float(test[1].bincount().max() / len(test[1]))
    else:
        right, chance = views_told(network, test[0])
    data = save({name: value.half().contiguous() for name, value in network.state_dict().items()})
    own = OwnExtractor(
        sha256=hashlib.sha256(data).hexdigest(),
        task="classes" if labelled else "views",
        accuracy=right,
        chance=chance,
    )
    store.write(layout.own_extractor_weights(dataset.digest, own.sha256), data)
    if not store.create(layout.own_extractor(dataset.digest), seal(own)) and find_own(store, dataset.digest) is None:
        store.write(layout.own_extractor(dataset.digest), seal(own))  # over a damaged one


def _read(store: Store, dataset: Manifest, split: Split, copies: Path) -> Data:
    """The first images of a split as the network sees them."""
    shards, pixels = (
        ShardImages(store, dataset, split, dataset.images.size, copies, memory_bytes=0),
        Pixels(dataset.images),
    )
    images, labels = list[Tensor](), list[Tensor]()
    for array, of_array in shards.all():
        images.append(pixels.encode(array))
        labels.append(torch.from_numpy(of_array))
        if sum(map(len, images)) >= OWN_IMAGES:
            break
    return torch.cat(images)[:OWN_IMAGES], torch.cat(labels)[:OWN_IMAGES]


JOB = ExtractorJob, train_own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="the EuroSAT zip or folder")
    parser.add_argument("--output", type=Path, default=SHIPPED_WEIGHTS, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()

    data: dict[str, Data] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = ingest(read_eurosat(arguments.archive), FolderStore(Path(folder)))
        for split in ("train", "test"):
            shards = ShardImages(
                FolderStore(Path(folder)), dataset, split, dataset.images.size, Path(folder), memory_bytes=0
            )
            pixels, labels = (np.concatenate(parts) for parts in zip(*shards.all(), strict=True))
            data[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels)
    began = time.monotonic()

    def told(epoch: int, loss: float) -> None:
        print(f"epoch {epoch}/{arguments.epochs}  loss {loss:.4f}  {time.monotonic() - began:.0f} s", flush=True)

    classes = dataset.images.classes
    network = fit(data["train"], len(classes), arguments.epochs, torch.device("cpu"), tell_classes, told)
    report = {
        "classes": list(classes),
        "dataset": dataset.digest,
        "accuracy": round(accuracy(network, *data["test"]), 4),
        "accuracy_at_32": round(accuracy(network, F.avg_pool2d(data["test"][0], 2), data["test"][1]), 4),
        "epochs": arguments.epochs,
    }
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, arguments.output, metadata={"report": json.dumps(report)})
    print(json.dumps(report, indent=1), f"\n{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        rank_main(*JOB)
    else:
        main()
