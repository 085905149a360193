"""What safety costs: step time with checkpoints every 50 steps, journal, progress and MLflow on, against all of it off.

    python -m benchmarks.cost [--steps 1800]

One process, one training of the demo's recipe; stretches of 200 steps with everything and with nothing take turns, so that both
meet the same machine. Checkpoints are written in the background, as in a job; the last write of a stretch is waited for. Also:
the exact reduction against the fast one on two processes, and what a seek costs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages, prefetch
from diffusion.data.manifest import Manifest
from diffusion.data.order import Order
from diffusion.data.sources.find import EUROSAT, find_archive, read_source
from diffusion.jobs.specs import TrainingJob
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from diffusion.settings import settings
from diffusion.store.objects import FolderStore, Store, open_store
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import open_experiment
from diffusion.tracking.run import Lineage, TrackedRun
from diffusion.tracking.sender import MetricsSender
from diffusion.training.batches import Batches
from diffusion.training.journal import TIMING, records
from diffusion.training.loop import CheckpointWriter, state_of
from diffusion.training.recorder import Recorder
from diffusion.training.trainer import Trainer
from flows.launcher import run_job

STRETCH, CHECKPOINT_EVERY = 200, 50


def stretches(recipe: Recipe, dataset: Manifest, store: Store, folder: Path, steps: int) -> dict[str, list[float]]:
    """Seconds of each stretch, by what was on; the first, which warms up, is left out."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    trainer = Trainer(recipe, dataset, accelerator, store)
    images = ShardImages(store, dataset, "train", recipe.data.image_size, folder)
    for index in range(len(images.shards)):
        images.shard(index)  # decoding is the data's cost, not safety's
    batches = prefetch(Batches(recipe, images, trainer.lanes), 0, steps)
    writer, recorder = (
        CheckpointWriter(FolderStore(folder / "store"), folder),
        Recorder(recipe, accelerator, folder, steps, flops=1.0),
    )
    client = connect(f"sqlite:///{folder / 'mlflow.db'}")
    lineage = Lineage(key="cost", name="cost", commit="unknown", flow_run_id="", flow_run_url="", owner="{}")
    experiment_id = open_experiment(client, folder / "artifacts")
    tracked = TrackedRun.open(client, experiment_id, lineage, recipe, dataset, store.uri)
    found: dict[str, list[float]] = {"everything": [], "nothing": []}
    with MetricsSender(tracked, folder):
        for stretch in range(steps // STRETCH):
            # on, off, off, on: a drift of the machine's speed falls on both.
            on = stretch % 4 in (0, 3)
            began = time.perf_counter()
            for step in range(1, STRETCH + 1):
                report = trainer.train_step(next(batches))
                if on:
                    recorder.record(trainer.step, report, 0.0)
                    if step % CHECKPOINT_EVERY == 0:
                        writer.save(trainer, state_of(trainer, "cost", dataset.digest), recorder.journal.read())
            writer.wait()  # or the last of the writes would fall into the next stretch
            if stretch >= 1:
                found["everything" if on else "nothing"].append(time.perf_counter() - began)
    return found


def speed(recipe: Recipe, dataset: Manifest, store: Store, folder: Path, processes: int) -> float:
    """Images a second of a training job in its second half."""
    job = TrainingJob(
        run=f"{folder.name}-{recipe.reduction}-{processes}",
        store=store.uri,
        dataset=dataset.digest,
        shard_copies=folder,
        recipe=recipe,
        until=recipe.total_steps,
        checkpoint_every=10**9,
    )
    where = folder / f"{recipe.reduction}-{processes}"
    run_job(job.MODULE, job, where, processes, threads=1)
    rows = records((where / TIMING).read_bytes())
    return float(np.median([row["images_per_second"] for row in rows[len(rows) // 2 :]]))


def seek_seconds(dataset: Manifest, recipe: Recipe) -> float:
    """The middle of a window in epoch 1000, with nothing remembered of the order."""
    sizes = tuple(shard.samples for shard in dataset.shards_of("train"))
    began = time.perf_counter()
    Order(sizes, recipe.data.window_shards, seed=12345).at(1000 * sum(sizes) + sum(sizes) // 3, recipe.data.batch_size)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args()
    environment = settings()
    store = open_store(environment.store_uri)
    dataset = ingest(read_source(EUROSAT, find_archive(EUROSAT, environment)), store)
    recipe = load_recipe("demo", {"data.images": 16 * arguments.steps})
    print(f"seek to the middle of a window in epoch 1000: {1000 * seek_seconds(dataset, recipe):.1f} ms")
    with tempfile.TemporaryDirectory() as folder:
        found = stretches(recipe, dataset, store, Path(folder), arguments.steps)
        medians = {name: float(np.median(values)) / STRETCH for name, values in found.items()}
        print(json.dumps({name: [round(value, 3) for value in values] for name, values in found.items()}))
        with_all, bare = 1000 * medians["everything"], 1000 * medians["nothing"]
        print(f"a step: {with_all:.1f} ms with everything, {bare:.1f} ms with nothing: {with_all / bare:.3f}")
        speeds = {
            reduction: speed(
                load_recipe("demo", {"data.images": 6400, "reduction": reduction}), dataset, store, Path(folder), 2
            )
            for reduction in ("exact", "fast")
        }
        exact, fast = speeds["exact"], speeds["fast"]
        print(f"two processes: exact {exact:.0f} images/s, fast {fast:.0f}: {exact / fast:.3f}")


if __name__ == "__main__":
    main()
