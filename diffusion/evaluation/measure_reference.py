"""The job that measures a reference: features of the real images, once per dataset version, extractor and image size."""

from __future__ import annotations

from functools import partial
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Split, require_dataset
from diffusion.evaluation.reference import Reference, write_reference
from diffusion.evaluation.sharding import share_out
from diffusion.evaluation.statistics import Moments
from diffusion.features.extractor import load_extractor
from diffusion.features.identity import identify
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import ReferenceJob
from diffusion.store import layout
from diffusion.store.objects import open_store

KEPT_BYTES = 64_000_000  # of the train split's features: all under `eurosat`; the moments are of all in any case
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

    def embedded(split: Split) -> NDArray[np.float32]:
        images = images_of[split]

        def of_shard(shard: int, _: range) -> Tensor:
            pixels, _labels = images.shard(shard)
            return torch.cat([extractor.embed(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])

        report = partial(progress.write, f"features of real {split} images")
        return share_out(accelerator, [shard.samples for shard in images.shards], of_shard, blank, report)

    train, test = embedded("train"), embedded("test")
    if accelerator.is_main_process:
        kept, labels = KEPT_BYTES // train[0].nbytes, images_of["train"].labels()
        counts = np.bincount(labels, minlength=max(1, len(manifest.images.classes)))
        write_reference(store, name, Reference(Moments.of(train), train[:kept], labels[:kept], test, counts))
    accelerator.wait_for_everyone()


JOB = ReferenceJob, measure_reference

if __name__ == "__main__":
    rank_main(*JOB)
