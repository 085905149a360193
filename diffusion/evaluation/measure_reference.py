"""The job that measures a reference: features of the real images, once per dataset version, extractor and image size."""

from __future__ import annotations

import numpy as np
import torch

from diffusion.data.loader import ShardImages
from diffusion.data.manifest import require_dataset
from diffusion.evaluation.reference import Reference, write_reference
from diffusion.evaluation.sharding import gather_rows
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
    extractor = load_extractor(known, store, manifest, accelerator.device, job.inception)
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    blank = extractor.embed(np.zeros((1, *manifest.images.shape(job.image_size)), manifest.images.dtype))[0]
    features = {}
    for split in ("train", "test"):
        images = ShardImages(store, manifest, split, job.image_size, job.shard_copies, memory_bytes=0)
        mine = range(accelerator.process_index, len(images.shards), accelerator.num_processes)
        blocks = {}
        for done, shard in enumerate(mine, start=1):
            pixels, _ = images.shard(shard)
            parts = [extractor.embed(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
            blocks[shard] = torch.cat(parts)
            progress.write(f"features of real {split} images", done, len(mine))
        features[split] = gather_rows(accelerator, blocks, [shard.samples for shard in images.shards], blank)
    if accelerator.is_main_process:
        train = Moments.of(features["train"])
        kept = KEPT_BYTES // features["train"][0].nbytes
        train_images = ShardImages(store, manifest, "train", job.image_size, job.shard_copies, memory_bytes=0)
        labels = np.concatenate([train_images.labels(index) for index in range(len(train_images.shards))])
        counts = np.bincount(labels, minlength=max(1, len(manifest.images.classes)))
        write_reference(
            store, name, Reference(train, features["train"][:kept], labels[:kept], features["test"], counts)
        )
    accelerator.wait_for_everyone()


JOB = ReferenceJob, measure_reference

if __name__ == "__main__":
    rank_main(*JOB)
