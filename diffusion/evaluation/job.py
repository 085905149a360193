"""The evaluation job: samples of a checkpoint, their scores, and a grid. A rank is `python -m diffusion.evaluation.job FOLDER`."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.ingest import find_dataset
from diffusion.data.loader import ShardImages
from diffusion.data.manifest import Manifest
from diffusion.data.sealed import seal
from diffusion.data.spec import Images
from diffusion.denoiser import Denoiser, Pixels, build_network
from diffusion.errors import DataError
from diffusion.evaluation.comparison import Evidence
from diffusion.evaluation.extractor import Extractor, load_extractor
from diffusion.evaluation.figures import Features, measured
from diffusion.evaluation.likelihood import bits_per_dim
from diffusion.evaluation.names import identify
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid, png, row_names
from diffusion.evaluation.reference import load_reference
from diffusion.evaluation.scores import ScoredBy, Scores
from diffusion.evaluation.sharding import block_sizes, gather_rows
from diffusion.evaluation.showpieces import interpolation, real_images, trajectory
from diffusion.evaluation.spectrum import Spectra, first_powers, powers
from diffusion.evaluation.statistics import Memorisation, Moments, frechet_distance
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import EvaluationJob
from diffusion.model.placement import place
from diffusion.recipe import Recipe
from diffusion.store import layout
from diffusion.store.objects import Store, open_store
from diffusion.training.checkpoint import load_tensors
from diffusion.training.state import State, load_state, weights_to_try

EMBEDDING_BATCH = 250
SEED = 0
SENT_AS = {"uint8": "uint8", "uint16": "int32", "float32": "float32"}
"""What levels travel as between processes, which know no uint16."""


def load_denoiser(store: Store, state: State, manifest: Manifest, weights: str, device: torch.device) -> Denoiser:
    """The denoiser of a checkpoint with the weights of that name: `model`, or a moving average's."""
    network = build_network(state.recipe, manifest.images)
    network.load_state_dict(load_tensors(store, state, weights))
    network = place(network.eval().requires_grad_(False), device)
    return Denoiser(state.recipe, network, Pixels(manifest.images))


def evaluate(job: EvaluationJob, rank: Rank) -> None:
    """Score a checkpoint and store its pictures and, last, `scores.json`. The work is shared out in blocks of images."""
    store, accelerator = open_store(job.store), rank.accelerator
    state = load_state(store, job.run, job.step)
    if job.evaluation is not None:
        state = state.model_copy(update={"recipe": state.recipe.model_copy(update={"evaluation": job.evaluation})})
    manifest = find_dataset(store, job.dataset)
    trained_on = manifest if manifest and manifest.digest == state.dataset else find_dataset(store, state.dataset)
    if manifest is None or trained_on is None:
        raise DataError(f"The store {store.uri} lacks the dataset {state.dataset} that run {job.run} was trained on.")
    manifest.images.check_alike(trained_on.images)
    recipe, spec = state.recipe, manifest.images
    progress = ProgressFile(rank.folder, accelerator.is_main_process)
    known = [identify(name, store, manifest, job.inception) for name in recipe.evaluation.extractors]
    extractors = [load_extractor(extractor, store, manifest, accelerator.device, job.inception) for extractor in known]
    size = recipe.data.image_size
    references = [load_reference(store, layout.reference(job.dataset, e.name, e.sha256, size)) for e in extractors]
    candidates = [job.weights] if job.weights else weights_to_try(recipe, job.step)

    def sample(weights: str, indices: range, stage: str) -> Images:
        denoiser = load_denoiser(store, state, trained_on, weights, accelerator.device)
        return generate(denoiser, manifest, indices, accelerator, progress, stage)

    fid_by_weights = {}
    if len(candidates) > 1:
        # Others than the samples that are scored: a figure must not be of what it was chosen by.
        spare = range(job.samples, job.samples + recipe.evaluation.choice_samples)
        for weights in candidates:
            features = embed_samples(extractors[0], sample(weights, spare, f"sampling {weights}"), accelerator)
            fid_by_weights[weights] = frechet_distance(Moments.of(features), references[0].train)
    weights = min(candidates, key=lambda name: fid_by_weights.get(name, 0.0))
    denoiser = load_denoiser(store, state, trained_on, weights, accelerator.device)
    images = sample(weights, range(job.samples), "sampling")
    labels = sample_labels(recipe, manifest, range(job.samples))
    embedded = [embed_samples(extractor, images, accelerator) for extractor in extractors]
    test = ShardImages(store, manifest, "test", size, job.shard_copies)
    bound, bits_of_images = None, np.zeros(0)
    if spec.counted:
        bound, bits_of_images = bits_per_dim(denoiser, test, recipe.evaluation.likelihood_images, accelerator, progress)

    where = layout.evaluation(job.run, job.step, job.name)
    ended = job.step == recipe.total_steps
    final = ended and not job.name
    scores = None
    if accelerator.is_main_process:
        subjects = [
            Features(features, labels, reference, spec.classes, extractor.classify)
            for extractor, features, reference in zip(extractors, embedded, references, strict=True)
        ]
        deciding = subjects[0]
        train = ShardImages(store, manifest, "train", size, job.shard_copies, memory_bytes=0)
        store.write(f"{where}/closest.png", png(closest_pairs(images, deciding.copies, train)))
        real = [first_powers(spec.clipped(real) for real, _ in split.all()) for split in (train, test)]
        rows = measured(Spectra(powers(images), *real))
        for extractor, subject in zip(extractors, subjects, strict=True):
            rows += measured(subject, extractor.name)
        if bound is not None:
            rows += measured(bound)
        evidence = None
        if ended:
            evidence = Evidence(deciding.samples, deciding.copies.close, bits_of_images).to_bytes()
            store.write(layout.evidence(job.run, job.step, job.name), evidence)
        scores = Scores(
            step=job.step,
            images_seen=state.images_seen,
            checkpoint=state.digest,
            weights=weights,
            fid_by_weights=fid_by_weights,
            samples=job.samples,
            real_samples=len(deciding.real),
            extractors=tuple(ScoredBy(name=e.name, sha256=e.sha256) for e in extractors),
            rows=tuple(rows),
            bound=bound,
            evidence_sha256=hashlib.sha256(evidence).hexdigest() if evidence else None,
        )
    if accelerator.is_last_process:  # while the first one, where there are several, counts
        with_noise = job.step == recipe.milestones[0] and not job.name
        for name, picture in pictures(denoiser, manifest, images, test, with_noise, final).items():
            store.write(f"{where}/{name}.png", png(picture))
    accelerator.wait_for_everyone()
    if scores is not None:
        store.write(f"{where}/scores.json", seal(scores))
    accelerator.wait_for_everyone()


def pictures(
    denoiser: Denoiser, manifest: Manifest, images: Images, test: ShardImages, with_noise: bool, final: bool
) -> dict[str, Image.Image]:
    """What people look at, by name: a grid of the samples; the noise that they began as; at the end the showpieces."""
    spec, recipe = manifest.images, denoiser.recipe
    names = row_names(spec, recipe.network.class_conditional)
    # The columns are fixed by the samples' indices: the same noise at every milestone.
    shown = GRID_COLUMNS * len(names)
    found = {"grid": class_grid(spec.display(images[:shown]), names)}
    if with_noise:
        noise = denoiser.pixels.decode(denoiser.start(range(shown), SEED))
        found["noise"] = class_grid(spec.display(noise), names)
    if final:
        labels = sample_labels(recipe, manifest, range(len(names)))
        found["trajectory"] = trajectory(denoiser, labels, names)
        found["interpolation"] = interpolation(denoiser, labels, names)
        found["real"] = real_images(test, names)
    return found


def sample_labels(recipe: Recipe, manifest: Manifest, indices: range) -> NDArray[np.int64] | None:
    """The classes of samples: sample i is of class i modulo their number. None for an unconditional network."""
    return np.array(indices) % len(manifest.images.classes) if recipe.network.class_conditional else None


def generate(
    denoiser: Denoiser, manifest: Manifest, indices: range, accelerator: Accelerator, progress: ProgressFile, stage: str
) -> Images:
    """These samples, on every process; from the same noise for every model, so that they compare."""
    recipe, spec = denoiser.recipe, manifest.images
    sizes = block_sizes(len(indices), recipe.evaluation.batch)
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    blocks = {}
    for done, block in enumerate(mine, start=1):
        start = block * recipe.evaluation.batch
        own = indices[start : start + sizes[block]]
        drawn = denoiser.sample(own, sample_labels(recipe, manifest, own), SEED)
        blocks[block] = torch.from_numpy(drawn.astype(SENT_AS[spec.dtype], copy=False)).to(accelerator.device)
        progress.write(stage, done, len(mine))
    like = torch.from_numpy(np.zeros(spec.shape(recipe.data.image_size), SENT_AS[spec.dtype]))
    return gather_rows(accelerator, blocks, sizes, like).astype(spec.dtype, copy=False)


def embed_samples(extractor: Extractor, images: Images, accelerator: Accelerator) -> NDArray[np.float32]:
    """Features of all images, on every process; the work is shared out in blocks."""
    sizes = block_sizes(len(images), EMBEDDING_BATCH)
    blocks = {
        block: extractor.embed(images[block * EMBEDDING_BATCH : block * EMBEDDING_BATCH + sizes[block]])
        for block in range(accelerator.process_index, len(sizes), accelerator.num_processes)
    }
    return gather_rows(accelerator, blocks, sizes, extractor.embed(images[:1])[0])


def closest_pairs(images: Images, copies: Memorisation, train: ShardImages, count: int = 10) -> Image.Image:
    """The samples that lie nearest to a training image, above these images."""
    chosen = np.argsort(copies.distances)[:count]
    starts = np.cumsum([0, *(shard.samples for shard in train.shards)])
    nearest = copies.nearest[chosen]
    shards = np.searchsorted(starts, nearest, side="right") - 1
    real, _ = train.take(shards, nearest - starts[shards])
    pairs = np.stack([images[chosen], real], axis=1).reshape(-1, *images.shape[1:])
    return class_grid(train.spec.display(pairs), ["sample", "nearest real"])


JOB = EvaluationJob, evaluate

if __name__ == "__main__":
    rank_main(*JOB)
