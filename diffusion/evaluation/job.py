"""The evaluation job: samples of a checkpoint, their scores, and a grid. `torchrun … -m diffusion.evaluation.job FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from diffusion.data.ingest import find_dataset
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.store import Store, open_store
from diffusion.denoiser import Denoiser, Pixels, build_network
from diffusion.errors import DataError, StoreError
from diffusion.evaluation.extractor import load_extractor
from diffusion.evaluation.likelihood import bits_per_dim
from diffusion.evaluation.names import extractor_sha256, reference_name
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid, png
from diffusion.evaluation.reference import load_reference
from diffusion.evaluation.scores import SampleScores, Scores, evaluation_folder
from diffusion.evaluation.sharding import block_sizes, gather_rows
from diffusion.evaluation.statistics import Moments, frechet_distance, kernel_distance
from diffusion.job import EvaluationJob, ProgressFile, run_job
from diffusion.model.placement import place
from diffusion.training.checkpoint import load_tensors
from diffusion.training.state import State, load_state


def load_denoiser(store: Store, state: State, manifest: Manifest, device: torch.device) -> Denoiser:
    """The denoiser of a checkpoint, with the weights that its recipe wants scored."""
    recipe = state.recipe
    network = build_network(recipe, len(manifest.classes))
    network.load_state_dict(load_tensors(store, state, "ema" if recipe.evaluation.weights == "ema" else "model"))
    network = place(network.eval().requires_grad_(False), device)
    return Denoiser(recipe, network, Pixels(manifest.pixel_mean, manifest.pixel_std))


def evaluate(job: EvaluationJob, folder: Path, accelerator: Accelerator) -> None:
    """Score a checkpoint and store `grid.png` and, last, `scores.json`. The work is shared out in blocks of images."""
    store = open_store(job.store)
    state = load_state(store, job.run, job.step)
    manifest = find_dataset(store, job.dataset)
    if manifest is None or manifest.digest != state.dataset:
        raise DataError(f"The store {store.uri} lacks the dataset {state.dataset} that run {job.run} was trained on.")
    recipe = state.recipe
    denoiser = load_denoiser(store, state, manifest, accelerator.device)
    progress = ProgressFile(folder, accelerator.is_main_process)

    images, labels = generate(denoiser, manifest, job.samples, accelerator, progress)
    by_extractor = tuple(
        score_samples(name, images, labels, store, job, recipe.data.image_size, accelerator)
        for name in recipe.evaluation.extractors
    )
    test = ShardImages(store, manifest, "test", recipe.data.image_size, job.shard_copies)
    bound = bits_per_dim(denoiser, test, recipe.evaluation.likelihood_images, accelerator, progress)

    if accelerator.is_main_process:
        where = evaluation_folder(job.run, job.step)
        rows = list(manifest.classes) if recipe.network.class_conditional else [""] * len(manifest.classes)
        # The columns are fixed by the samples' indices: the same noise at every milestone.
        shown = GRID_COLUMNS * len(rows)
        store.write(f"{where}/grid.png", png(class_grid(images[:shown], rows)))
        scores = Scores(
            step=job.step,
            images_seen=state.images_seen,
            checkpoint=state.digest,
            bits_per_dim=bound.bits,
            bits_per_dim_error=bound.error,
            likelihood_images=bound.images,
            by_extractor=by_extractor,
        )
        store.write(f"{where}/scores.json", (json.dumps(scores.model_dump(mode="json"), indent=1) + "\n").encode())
    accelerator.wait_for_everyone()


def generate(
    denoiser: Denoiser, manifest: Manifest, samples: int, accelerator: Accelerator, progress: ProgressFile
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Samples 0..samples-1 of the recipe's seed, on every process, and their labels (sample i has class i % classes)."""
    recipe = denoiser.recipe
    labels = np.arange(samples) % len(manifest.classes) if recipe.network.class_conditional else None
    sizes = block_sizes(samples, recipe.evaluation.batch)
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    blocks = {}
    for done, block in enumerate(mine, start=1):
        start = block * recipe.evaluation.batch
        indices = range(start, start + sizes[block])
        drawn = denoiser.sample(indices, None if labels is None else labels[indices.start : indices.stop], recipe.seed)
        blocks[block] = torch.from_numpy(drawn).to(accelerator.device)
        progress.write("sampling", done, len(mine))
    size = recipe.data.image_size
    return gather_rows(accelerator, blocks, sizes, torch.zeros((size, size, 3), dtype=torch.uint8)), labels


def score_samples(
    name: str,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    store: Store,
    job: EvaluationJob,
    image_size: int,
    accelerator: Accelerator,
) -> SampleScores:
    """FID, KID and their floors under one extractor."""
    extractor = load_extractor(name, accelerator.device, job.inception)
    where = reference_name(job.dataset, name, extractor_sha256(name, job.inception), image_size)
    try:
        reference = load_reference(store, where)
    except KeyError:
        raise StoreError(f"The reference {store.uri}/{where} is missing. Measure it before the evaluation.") from None
    embedded = torch.cat([extractor.embed(images[start : start + 250]) for start in range(0, len(images), 250)])
    features = embedded.cpu().numpy()
    kid, kid_error = kernel_distance(features, reference.train_features)
    floor = reference.test_features[: len(features)]
    accuracy = None
    if labels is not None and extractor.classify is not None:
        accuracy = float((extractor.classify(embedded).cpu().numpy() == labels).mean())
    return SampleScores(
        extractor=name,
        extractor_sha256=extractor.sha256,
        samples=len(features),
        fid=frechet_distance(Moments.of(features), reference.train),
        kid=kid,
        kid_error=kid_error,
        floor_samples=len(floor),
        fid_floor=frechet_distance(Moments.of(floor), reference.train),
        kid_floor=kernel_distance(floor, reference.train_features)[0],
        class_accuracy=accuracy,
    )


if __name__ == "__main__":
    run_job(EvaluationJob, evaluate)
