"""What a GPU makes of a preset: its speed, whether a resume is exact there, and the figures of a training of some minutes.

    python -m benchmarks.gpu STORE DATASET --out FOLDER [--preset eurosat] [--seconds 200]

STORE holds the dataset of that digest. Needs neither Prefect nor MLflow: jobs are started as the flow starts them.
"""

from __future__ import annotations

import argparse
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusion.data.loader import ShardImages, prefetch
from diffusion.data.manifest import Manifest, require_dataset
from diffusion.jobs.specs import EvaluationJob, JobSpec, ReferenceJob, TrainingJob
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from diffusion.store import layout
from diffusion.store.objects import Store, open_store
from diffusion.training.batches import Batches
from diffusion.training.trainer import Trainer
from flows.launcher import run_job

WARM, MEASURED = 10, 30
RESUMED_STEPS = 40


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speeds(recipe: Recipe, dataset: Manifest, store: Store, copies: Path) -> dict[str, float]:
    """Images a second: of the batches alone, of the steps alone, of both as a training has them."""
    accelerator = Accelerator()
    trainer = Trainer(recipe, dataset, accelerator, store)
    images = ShardImages(store, dataset, "train", recipe.data.image_size, copies)
    batches = Batches(recipe, images, trainer.lanes, pin_memory=accelerator.device.type == "cuda")
    stream = prefetch(batches, 0, 10**6)
    kept = [lane.to(accelerator.device) for lane in next(stream)]
    began = time.perf_counter()
    trainer.train_step(kept)
    synchronise()
    print(f"first step, with compilation: {time.perf_counter() - began:.1f} s", flush=True)

    def rate(step: object) -> float:
        for index in range(WARM + MEASURED):
            if index == WARM:
                synchronise()
                began = time.perf_counter()
            step()  # type: ignore[operator]
        synchronise()
        return MEASURED * recipe.data.batch_size / (time.perf_counter() - began)

    found = {
        "batches alone": rate(lambda: next(stream)),
        "steps alone": rate(lambda: trainer.train_step(kept)),
        "both": rate(lambda: trainer.train_step([lane.to(accelerator.device) for lane in next(stream)])),
    }
    if torch.cuda.is_available():
        print(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    return found


class Jobs:
    """Starts jobs on one store and dataset."""

    def __init__(self, store: Store, dataset: str, folder: Path) -> None:
        self.store, self.dataset, self.folder = store, dataset, folder
        self.own = uuid.uuid4().hex[:8]
        """What its runs are called by: those of an earlier call would be gone on with."""

    def run(self, spec: JobSpec) -> None:
        """Run a job on one process."""
        where = self.folder / f"{spec.run}-{spec.MODULE.rpartition('.')[0]}"
        run_job(spec.MODULE, spec, where, 1, threads=4)

    def train(self, run: str, recipe: Recipe, until: int, deterministic: bool = False) -> None:
        """Train that run to a step."""
        spec = TrainingJob(
            run=run,
            store=self.store.uri,
            dataset=self.dataset,
            shard_copies=self.folder / "copies",
            deterministic=deterministic,
            recipe=recipe,
            until=until,
            checkpoint_every=10**6,
        )
        self.run(spec)

    def same_after_resume(self, recipe: Recipe, deterministic: bool) -> dict[str, bool]:
        """Whether a training stopped half way and continued by another process ends like one that was not, by file."""
        way = "deterministic" if deterministic else "default"
        whole, halves = (f"{name}-{way}-{self.own}" for name in ("whole", "halves"))

        def in_halves() -> None:
            for until in (RESUMED_STEPS // 2, RESUMED_STEPS):
                self.train(halves, recipe, until, deterministic)

        with ThreadPoolExecutor() as pool:
            for task in (pool.submit(self.train, whole, recipe, RESUMED_STEPS, deterministic), pool.submit(in_halves)):
                task.result()
        one, other = (f"{layout.checkpoint(run, RESUMED_STEPS)}/" for run in (whole, halves))
        names = [name.removeprefix(one) for name in self.store.names(one) if name.endswith(".safetensors")]
        return {name: self.store.read(one + name) == self.store.read(other + name) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="eurosat")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--reductions", nargs="+", default=["fast", "exact"])
    arguments = parser.parse_args()
    store, out = open_store(arguments.store), arguments.out
    scratch = out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    dataset = require_dataset(store, arguments.dataset)
    print(
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}", flush=True
    )
    rates = {}
    for reduction in arguments.reductions:
        recipe = load_recipe(arguments.preset, {"reduction": reduction})
        rates[reduction] = speeds(recipe, dataset, store, scratch / "copies")
        print(reduction, {name: round(rate) for name, rate in rates[reduction].items()}, flush=True)
        torch.cuda.empty_cache()

    jobs = Jobs(store, arguments.dataset, scratch)
    few = load_recipe(arguments.preset, {})
    batch = few.data.batch_size
    few = load_recipe(
        arguments.preset, {"data.images": batch * RESUMED_STEPS, "evaluation.every_images": batch * RESUMED_STEPS}
    )
    with ThreadPoolExecutor() as pool:
        for name, same in zip(
            ("deterministic", "default"),
            pool.map(lambda det: jobs.same_after_resume(few, det), (True, False)),
            strict=True,
        ):
            print(f"resumed half way, {name}: {same}", flush=True)

    images = int(max(rate["both"] for rate in rates.values()) * arguments.seconds) // batch * batch
    every = {"evaluation.every_images": images, "optimizer.warmup_images": min(100_000, images // 10)}
    recipe = load_recipe(arguments.preset, {"data.images": images, **every})
    began = time.perf_counter()
    trained = f"trained-{jobs.own}"
    jobs.train(trained, recipe, recipe.total_steps)
    print(
        f"trained on {images} images in {time.perf_counter() - began:.0f} s, start and compilation included", flush=True
    )
    common = {
        "run": trained,
        "store": store.uri,
        "dataset": arguments.dataset,
        "shard_copies": scratch / "copies",
    }
    began = time.perf_counter()
    size = recipe.data.image_size
    jobs.run(ReferenceJob(**common, image_size=size, extractor="eurosat"))
    print(f"reference: {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    samples = recipe.evaluation.samples
    jobs.run(EvaluationJob(**common, step=recipe.total_steps))
    print(f"evaluation of {samples} samples: {time.perf_counter() - began:.0f} s", flush=True)
    for name in store.names(f"runs/{trained}/"):
        print(name)
        if name.endswith((".png", "scores.json")):
            (out / name.rpartition("/")[2]).write_bytes(store.read(name))


if __name__ == "__main__":
    main()
