"""The job that trains a dataset's own extractor. A rank is `python -m diffusion.features.train_extractor FOLDER`.

What is stored are fused weights as float16 safetensors, and the accuracy that those very weights reach on the test split.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

if __name__ == "__main__":
    # Read when torch is loaded. Its threads wait for each other after every small operation, by default without giving their
    # cores up: where others kept those busy, a dataset's own extractor took five times as long. Where nobody did, it made no
    # difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
from safetensors.torch import save

from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest, Split, require_dataset
from diffusion.data.sealed import seal
from diffusion.features.classifier import INPUT_SIZE
from diffusion.features.identity import OwnExtractor, find_own
from diffusion.features.learning import Labelled, accuracy, as_stored, fit, tell_classes, tell_views, views_told
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import ExtractorJob
from diffusion.pixels import Pixels
from diffusion.store import layout
from diffusion.store.objects import Store, open_store

OWN_IMAGES, OWN_BYTES = 20_000, 1 << 30
"""Of a split, by which a dataset's own extractor is trained, and tested; and what they may take of memory."""
OWN_BUDGET, OWN_EPOCHS = 40_000, 40
"""Images that it sees in all, and how often each of them at most: two minutes on two cores."""
VIEW_OUTPUTS = 64
"""Dimensions in which views of one image are drawn together."""


def train_own(job: ExtractorJob, rank: Rank) -> None:
    """Train a dataset's own extractor, and store it: to tell its classes or, where it has none, views of one image from others'."""
    store, accelerator = open_store(job.store), rank.accelerator
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    dataset = require_dataset(store, job.dataset)
    classes = len(dataset.images.classes)
    labelled = classes > 1
    train, test = (_read(store, dataset, split, job.shard_copies) for split in ("train", "test"))
    loss, outputs, looks = (tell_classes, classes, 1) if labelled else (tell_views, VIEW_OUTPUTS, 2)
    epochs = max(1, min(OWN_EPOCHS, OWN_BUDGET // looks // len(train)))

    def report(epoch: int, mean: float) -> None:
        progress.write("training the extractor", epoch, epochs, f"epoch {epoch} of {epochs}, loss {mean:.3f}")

    network = fit(train, outputs, epochs, accelerator.device, loss, report)
    if labelled:
        right, chance = accuracy(network, test), float(test.labels.bincount().max() / len(test))
    else:
        right, chance = views_told(network, test)
    data = save(as_stored(network))
    own = OwnExtractor(
        sha256=hashlib.sha256(data).hexdigest(),
        task="classes" if labelled else "views",
        accuracy=right,
        chance=chance,
    )
    store.write(layout.own_extractor_weights(dataset.digest, own.sha256), data)
    if not store.create(layout.own_extractor(dataset.digest), seal(own)) and find_own(store, dataset.digest) is None:
        store.write(layout.own_extractor(dataset.digest), seal(own))  # over a damaged one


def _read(store: Store, dataset: Manifest, split: Split, copies: Path) -> Labelled:
    """The first images of a split, averaged down as far as the network, which looks at parts of them as well, loses nothing by it."""
    spec = dataset.images
    factor = max(factor for factor in range(1, spec.size + 1) if factor == 1 or _fits(spec.size, factor))
    shape = spec.shape(spec.size // factor)
    shards = ShardImages(store, dataset, split, shape[0], copies, memory_bytes=0)
    images, labels = shards.first(min(OWN_IMAGES, OWN_BYTES // (math.prod(shape) * np.dtype(spec.dtype).itemsize)))
    return Labelled(images, torch.from_numpy(labels), Pixels(spec).encode)


def _fits(size: int, factor: int) -> bool:
    return size % factor == 0 and size // factor >= 2 * INPUT_SIZE


JOB = ExtractorJob, train_own

if __name__ == "__main__":
    rank_main(*JOB)
