"""Train a feature extractor: a classifier whose features samples are judged by.

    python -m diffusion.evaluation.train_extractor --archive EuroSAT.zip    the one that comes with the package
    python -m diffusion.evaluation.train_extractor FOLDER                   a dataset's own, as a job

The first takes about 20 minutes on 2 CPU cores. What is stored are fused weights as float16 safetensors, and the accuracy that
those very weights reach on the test split.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save, save_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.ingest import find_dataset, ingest
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest, Split
from diffusion.data.sealed import seal
from diffusion.data.sources.eurosat import read_eurosat
from diffusion.data.store import FolderStore, Store, open_store
from diffusion.denoiser import Pixels
from diffusion.errors import DataError
from diffusion.evaluation.classifier import Classifier, fuse
from diffusion.evaluation.names import SHIPPED_WEIGHTS, OwnExtractor, find_own, own_document, own_weights
from diffusion.job import ExtractorJob, ProgressFile, Rank, run_job
from diffusion.model.placement import place

EPOCHS = 14
BATCH = 128
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
HALF_RESOLUTION_SHARE = 0.3
OWN_IMAGES = 20_000
"""Of a split, by which a dataset's own extractor is trained, and tested."""
OWN_BUDGET, OWN_EPOCHS = 40_000, 40
"""Images that it sees in all, and how often each of them at most: two minutes on two cores."""
TURNS = 4


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


def fit(
    train: Data,
    classes: int,
    epochs: int,
    device: torch.device,
    change: Callable[[Tensor, Tensor, torch.Generator], Data],
    told: Callable[[int, float], None],
) -> Classifier:
    """A classifier of these images, fused, its weights rounded to float16 as they are stored.

    Args:
        change: how a batch is augmented.
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
            pixels, truth = change(images[chosen], labels[chosen], rng)
            pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(pixels), truth.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        told(epoch + 1, total / steps_per_epoch)
    return fuse(network.eval().cpu()).half().float()


def _with_symmetries(images: Tensor, labels: Tensor, rng: torch.Generator) -> Data:
    return augment(images, rng), labels


def _with_turns(images: Tensor, _: Tensor, rng: torch.Generator) -> Data:
    """Images turned by some quarters, which is what is to be told, and mirrored or not, which is not."""
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    turns = torch.randint(TURNS, (len(images),), generator=rng)
    return coarsen(turned(images, turns), rng), turns


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Each image turned by its number of quarters."""
    out = images.clone()
    for quarters in range(1, TURNS):
        out[turns == quarters] = torch.rot90(images[turns == quarters], quarters, (2, 3))
    return out


def train_own(job: ExtractorJob, rank: Rank) -> None:
    """Train a dataset's own extractor, and store it: to tell its classes, or quarter turns where it has none (Gidaris et al.
    2018, arXiv:1803.07728)."""
    store, accelerator = open_store(job.store), rank.accelerator
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    dataset = find_dataset(store, job.dataset)
    if dataset is None:
        raise DataError(f"The store {store.uri} has no dataset {job.dataset}. Ingest it first.")
    classes = len(dataset.images.classes)
    labelled = classes > 1
    train, test = (_read(store, dataset, split, job.shard_copies) for split in ("train", "test"))
    epochs = max(1, min(OWN_EPOCHS, OWN_BUDGET // len(train[0])))
    change, outputs = (_with_symmetries, classes) if labelled else (_with_turns, TURNS)

    def told(epoch: int, loss: float) -> None:
        progress.write("training the extractor", epoch, epochs, f"epoch {epoch} of {epochs}, loss {loss:.3f}")

    network = fit(train, outputs, epochs, accelerator.device, change, told)
    images, labels = test
    if not labelled:
        labels = torch.arange(len(images)) % TURNS
        images = turned(images, labels)
    data = save({name: value.half().contiguous() for name, value in network.state_dict().items()})
    chance = float(labels.bincount().max() / len(labels)) if labelled else 1 / TURNS
    own = OwnExtractor(
        sha256=hashlib.sha256(data).hexdigest(),
        task="classes" if labelled else "quarter turns",
        accuracy=accuracy(network, images, labels),
        chance=chance,
    )
    store.write(own_weights(dataset.digest, own.sha256), data)
    if not store.create(own_document(dataset.digest), seal(own)) and find_own(store, dataset.digest) is None:
        store.write(own_document(dataset.digest), seal(own))  # over a damaged one


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
    network = fit(data["train"], len(classes), arguments.epochs, torch.device("cpu"), _with_symmetries, told)
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
        run_job(*JOB)
    else:
        main()
