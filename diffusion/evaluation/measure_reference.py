"""The job that measures a reference: features of the real images, once per dataset version, extractor and image size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Split, require_dataset
from diffusion.evaluation.reference import Reference, write_reference
from diffusion.evaluation.sharding import in_turns
from diffusion.evaluation.statistics import Moments
from diffusion.features.extractor import load_extractor
from diffusion.features.identity import identify
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import ReferenceJob
from diffusion.store import layout
from diffusion.store.objects import open_store

KEPT_BYTES = 256_000_000
"""Of a split's features; the moments are of all in any case. EuroSAT's are kept whole, under `inception` too."""
BATCH = 250


def measure_reference(job: ReferenceJob, rank: Rank) -> None:
    """Compute and store the reference, unless the store has it. Images are shared out to the processes by shards."""
    store, accelerator = open_store(job.store), rank.accelerator
    manifest = require_dataset(store, job.dataset)
    known = identify(job.extractor, store, manifest, job.inception)
    name = layout.reference(job.dataset, known.name, known.sha256, job.image_size)
    extractor = load_extractor(known, store, manifest, accelerator.device, job.inception, job.shard_copies)
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    blank = extractor.embed(np.zeros((1, *manifest.images.shape(job.image_size)), manifest.images.dtype))[0]
    images_of: dict[Split, ShardImages] = {
        split: ShardImages(store, manifest, split, job.image_size, job.shard_copies, memory_bytes=0)
        for split in get_args(Split)
    }

    def embedded(split: Split) -> Iterator[NDArray[np.float32]]:
        images = images_of[split]

        def of_shard(shard: int) -> Tensor:
            pixels, _labels = images.shard(shard)
            return torch.cat([extractor.embed(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])

        report = partial(progress.write, f"features of real {split} images")
        return in_turns(accelerator, [shard.samples for shard in images.shards], of_shard, blank, report)

    train, test = (summarised(embedded(split), accelerator.is_main_process) for split in get_args(Split))
    if train is not None and test is not None:
        (moments, kept), labels = train, images_of["train"].labels()
        counts = np.bincount(labels, minlength=max(1, len(manifest.images.classes)))
        write_reference(store, name, Reference(moments, kept, labels[: len(kept)], test[1], counts))
    accelerator.wait_for_everyone()


def summarised(
    blocks: Iterator[NDArray[np.float32]], wanted: bool, kept_bytes: int = KEPT_BYTES
) -> tuple[Moments, NDArray[np.float32]] | None:
    """The moments of all features, and the first of them as they are; None if this is `wanted` of another process."""
    moments, kept, missing = None, list[NDArray[np.float32]](), 0
    for number, block in enumerate(blocks):
        if not wanted:
            continue
        of_block = Moments.of(block)
        moments = of_block if moments is None else moments.merge(of_block)
        missing = kept_bytes // block[0].nbytes if number == 0 else missing
        kept.append(block[:missing].copy())  # or it would hold the whole block
        missing -= len(kept[-1])
    return (moments, np.concatenate(kept)) if moments is not None else None


JOB = ReferenceJob, measure_reference

if __name__ == "__main__":
    rank_main(*JOB)
