"""Train the EuroSAT feature extractor that ships with the package.

    python -m diffusion.evaluation.train_extractor --archive EuroSAT.zip

About 20 minutes on 2 CPU cores. Writes the fused weights as float16 safetensors, with the accuracy that those very
weights reach on the test split in the file's metadata.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.eurosat import CLASSES, read_eurosat
from diffusion.data.ingest import split_by_hash
from diffusion.data.shards import decode_all
from diffusion.evaluation.classifier import INPUT_SIZE, EuroSATClassifier, fuse
from diffusion.evaluation.names import SHIPPED_WEIGHTS
from diffusion.model.placement import place

EPOCHS = 14
BATCH = 128
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
HALF_RESOLUTION_SHARE = 0.3


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """One random symmetry of the square for each image, and half the resolution for some: 32 x 32 recipes are scored too."""
    choice = torch.randint(8, (len(images),), generator=rng)
    out = images.clone()
    for symmetry in range(8):
        chosen = images[choice == symmetry]
        turned = torch.rot90(chosen, symmetry % 4, (2, 3))
        out[choice == symmetry] = turned.flip(3) if symmetry >= 4 else turned
    coarse = torch.rand(len(images), generator=rng) < HALF_RESOLUTION_SHARE
    if coarse.any():
        out[coarse] = F.interpolate(F.avg_pool2d(out[coarse], 2), scale_factor=2, mode="bilinear")
    return out


@torch.no_grad()
def accuracy(network: EuroSATClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of correct classes."""
    right = sum(
        int((network(batch).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="the EuroSAT zip or folder")
    parser.add_argument("--output", type=Path, default=SHIPPED_WEIGHTS, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()

    source = read_eurosat(arguments.archive)
    data: dict[str, tuple[Tensor, Tensor]] = {}
    for split, samples in split_by_hash(source).items():
        pixels = decode_all(samples, INPUT_SIZE, INPUT_SIZE)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        data[split] = images, torch.from_numpy(np.array([sample.label for sample in samples]))
    images, labels = data["train"]

    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    network = place(EuroSATClassifier(len(CLASSES), fused=False), torch.device("cpu"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=arguments.epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(arguments.epochs):
        start, total = time.monotonic(), 0.0
        network.train()
        order = torch.randperm(len(images), generator=rng)
        for step in range(steps_per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            batch = augment(images[chosen], rng).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(network(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        network.eval()
        print(
            f"epoch {epoch + 1}/{arguments.epochs}  loss {total / steps_per_epoch:.4f}  "
            f"test accuracy {accuracy(network, *data['test']):.4f}  {time.monotonic() - start:.0f} s",
            flush=True,
        )

    shipped = fuse(network, len(CLASSES)).half().float()  # score what is stored: weights rounded to float16
    coarse = F.avg_pool2d(data["test"][0], 2)
    report = {
        "classes": list(CLASSES),
        "dataset": source.digest,
        "accuracy": round(accuracy(shipped, *data["test"]), 4),
        "accuracy_at_32": round(accuracy(shipped, coarse, data["test"][1]), 4),
        "epochs": arguments.epochs,
    }
    weights = {name: value.half().contiguous() for name, value in shipped.state_dict().items()}
    save_file(weights, arguments.output, metadata={"report": json.dumps(report)})
    print(json.dumps(report, indent=1), f"\n{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
