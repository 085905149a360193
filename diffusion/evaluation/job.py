"""The evaluation job: samples of a checkpoint, their scores, and a grid. `torchrun … -m diffusion.evaluation.job FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.ingest import find_dataset
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.store import Store, open_store
from diffusion.denoiser import Denoiser, Pixels, build_network
from diffusion.errors import DataError, StoreError
from diffusion.evaluation.extractor import Extractor, load_extractor
from diffusion.evaluation.likelihood import bits_per_dim
from diffusion.evaluation.names import reference_name
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid, png
from diffusion.evaluation.reference import Reference, load_reference
from diffusion.evaluation.scores import SampleScores, Scores, evaluation_folder
from diffusion.evaluation.sharding import block_sizes, gather_rows
from diffusion.evaluation.statistics import (
    Memorisation,
    Moments,
    frechet_distance,
    frechet_error,
    frechet_extrapolated,
    kernel_distance,
    manifold,
    memorisation,
)
from diffusion.job import EvaluationJob, ProgressFile, run_job
from diffusion.model.placement import place
from diffusion.training.checkpoint import load_tensors
from diffusion.training.state import State, load_state

EMBEDDING_BATCH = 250


def load_denoiser(store: Store, state: State, manifest: Manifest, device: torch.device) -> Denoiser:
    """The denoiser of a checkpoint, with the weights that its recipe wants scored."""
    recipe = state.recipe
    network = build_network(recipe, len(manifest.classes))
    network.load_state_dict(load_tensors(store, state, "ema" if recipe.evaluation.weights == "ema" else "model"))
    network = place(network.eval().requires_grad_(False), device)
    return Denoiser(recipe, network, Pixels(manifest.pixel_mean, manifest.pixel_std))


def evaluate(job: EvaluationJob, folder: Path, accelerator: Accelerator) -> None:
    """Score a checkpoint and store `grid.png`, `closest.png` and, last, `scores.json`. The work is shared out in blocks of images."""
    store = open_store(job.store)
    state = load_state(store, job.run, job.step)
    if job.evaluation is not None:
        state = state.model_copy(update={"recipe": state.recipe.model_copy(update={"evaluation": job.evaluation})})
    manifest = find_dataset(store, job.dataset)
    if manifest is None or manifest.digest != state.dataset:
        raise DataError(f"The store {store.uri} lacks the dataset {state.dataset} that run {job.run} was trained on.")
    recipe = state.recipe
    denoiser = load_denoiser(store, state, manifest, accelerator.device)
    progress = ProgressFile(folder, accelerator.is_main_process)

    images, labels = generate(denoiser, manifest, job.samples, accelerator, progress)
    embedded = []
    for name in recipe.evaluation.extractors:
        extractor = load_extractor(name, accelerator.device, job.inception)
        embedded.append((extractor, embed_samples(extractor, images, accelerator)))
    test = ShardImages(store, manifest, "test", recipe.data.image_size, job.shard_copies)
    bound = bits_per_dim(denoiser, test, recipe.evaluation.likelihood_images, accelerator, progress)

    if accelerator.is_main_process:
        where = evaluation_folder(job.run, job.step, job.name)
        scored = [
            score_samples(extractor, features, labels, find_reference(store, job, extractor, images), manifest.classes)
            for extractor, features in embedded
        ]
        rows = list(manifest.classes) if recipe.network.class_conditional else [""] * len(manifest.classes)
        # The columns are fixed by the samples' indices: the same noise at every milestone.
        shown = GRID_COLUMNS * len(rows)
        store.write(f"{where}/grid.png", png(class_grid(images[:shown], rows)))
        train = ShardImages(store, manifest, "train", recipe.data.image_size, job.shard_copies, memory_bytes=0)
        store.write(f"{where}/closest.png", png(closest_pairs(images, scored[0][1], train)))
        scores = Scores(
            step=job.step,
            images_seen=state.images_seen,
            checkpoint=state.digest,
            bound=bound,
            by_extractor=tuple(scores for scores, _ in scored),
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


def embed_samples(extractor: Extractor, images: NDArray[np.uint8], accelerator: Accelerator) -> NDArray[np.float32]:
    """Features of all images, on every process; the work is shared out in blocks."""
    sizes = block_sizes(len(images), EMBEDDING_BATCH)
    blocks = {
        block: extractor.embed(images[block * EMBEDDING_BATCH : block * EMBEDDING_BATCH + sizes[block]])
        for block in range(accelerator.process_index, len(sizes), accelerator.num_processes)
    }
    return gather_rows(accelerator, blocks, sizes, extractor.embed(images[:1])[0])


def score_samples(
    extractor: Extractor,
    features: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    reference: Reference,
    classes: tuple[str, ...],
) -> tuple[SampleScores, Memorisation]:
    """All scores of the samples under one extractor, from their features."""
    kid, kid_error = kernel_distance(features, reference.train_features)
    floor = reference.test_features[: len(features)]
    cover = manifold(reference.train_features, features)
    copies = memorisation(reference.train_features, reference.test_features, features)
    accuracy = None
    if labels is not None and extractor.classify is not None:
        accuracy = float((extractor.classify(features) == labels).mean())
    scores = SampleScores(
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        samples=len(features),
        fid=frechet_distance(Moments.of(features), reference.train),
        fid_error=frechet_error(features, reference.train),
        fid_extrapolated=frechet_extrapolated(features, reference.train),
        kid=kid,
        kid_error=kid_error,
        precision=cover.precision,
        recall=cover.recall,
        density=cover.density,
        coverage=cover.coverage,
        memorisation=copies.ratio,
        memorisation_error=copies.error,
        floor_samples=len(floor),
        fid_floor=frechet_distance(Moments.of(floor), reference.train),
        kid_floor=kernel_distance(floor, reference.train_features)[0],
        class_accuracy=accuracy,
        class_fid=None if labels is None else class_distances(features, labels, reference, classes),
    )
    return scores, copies


def find_reference(store: Store, job: EvaluationJob, extractor: Extractor, images: NDArray[np.uint8]) -> Reference:
    """The reference to hold images of that size against. Raises StoreError if it has not been measured."""
    where = reference_name(job.dataset, extractor.name, extractor.sha256, images.shape[1])
    try:
        return load_reference(store, where)
    except KeyError:
        raise StoreError(f"The reference {store.uri}/{where} is missing. Measure it before the evaluation.") from None


def class_distances(
    features: NDArray[np.float32], labels: NDArray[np.int64], reference: Reference, classes: tuple[str, ...]
) -> dict[str, float]:
    """FID of each class that has samples against its real images."""
    found = {}
    for label, class_name in enumerate(classes):
        own, real = features[labels == label], reference.train_features[reference.train_labels == label]
        if len(own) > 1 and len(real) > 1:
            found[class_name] = frechet_distance(Moments.of(own), Moments.of(real))
    return found


def closest_pairs(images: NDArray[np.uint8], copies: Memorisation, train: ShardImages, count: int = 10) -> Image.Image:
    """The samples that lie nearest to a training image, above these images."""
    chosen = np.argsort(copies.distances)[:count]
    starts = np.cumsum([0, *(shard.samples for shard in train.shards)])
    nearest = copies.nearest[chosen]
    shards = np.searchsorted(starts, nearest, side="right") - 1
    real, _ = train.take(shards, nearest - starts[shards])
    pairs = np.stack([images[chosen], real], axis=1).reshape(-1, *images.shape[1:])
    return class_grid(pairs, ["sample", "nearest real"])


if __name__ == "__main__":
    run_job(EvaluationJob, evaluate)
