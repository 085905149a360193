"""The evaluation job: samples of a checkpoint, their scores, and a grid. A rank is `python -m diffusion.evaluation.job FOLDER`."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from diffusion.data.loader import ShardImages
from diffusion.data.manifest import find_dataset
from diffusion.data.sealed import seal
from diffusion.data.spec import Images, Labels
from diffusion.denoiser import Denoiser
from diffusion.errors import DataError
from diffusion.evaluation.comparison import Evidence
from diffusion.evaluation.figures import Features, measured
from diffusion.evaluation.labels import beside, in_proportion
from diffusion.evaluation.likelihood import measure_bound
from diffusion.evaluation.pictures import png
from diffusion.evaluation.protocol import PROTOCOL
from diffusion.evaluation.reference import load_reference
from diffusion.evaluation.sampling import generate, load_denoiser
from diffusion.evaluation.scores import BoundTerms, ScoredBy, Scores
from diffusion.evaluation.sharding import block_sizes, share_out
from diffusion.evaluation.showpieces import closest_pairs, pictures
from diffusion.evaluation.spectrum import Spectra, first_powers, powers
from diffusion.evaluation.statistics import Moments, frechet_distance
from diffusion.features.extractor import Extractor, load_extractor
from diffusion.features.identity import identify
from diffusion.jobs.rank import Rank, rank_main
from diffusion.jobs.reports import ProgressFile
from diffusion.jobs.specs import EvaluationJob
from diffusion.store import layout
from diffusion.store.objects import open_store
from diffusion.training.state import load_state, weights_to_try

EMBEDDING_BATCH = 250


def score_checkpoint(job: EvaluationJob, rank: Rank) -> None:
    """Score a checkpoint and store its pictures and, last, `scores.json`. The work is shared out in blocks of images."""
    Scoring(job, rank).run()


class Scoring:
    """An evaluation under way. Every rank has all samples and features; the first one scores, the last one draws."""

    def __init__(self, job: EvaluationJob, rank: Rank) -> None:
        self.job, self.store, self.accelerator = job, open_store(job.store), rank.accelerator
        state = load_state(self.store, job.run, job.step)
        if job.evaluation is not None:
            state = state.model_copy(update={"recipe": state.recipe.model_copy(update={"evaluation": job.evaluation})})
        manifest = find_dataset(self.store, job.dataset)
        trained_on = (
            manifest if manifest and manifest.digest == state.dataset else find_dataset(self.store, state.dataset)
        )
        if manifest is None or trained_on is None:
            raise DataError(
                f"The store {self.store.uri} lacks the dataset {state.dataset} that run {job.run} was trained on."
            )
        manifest.images.check_alike(trained_on.images)
        self.state, self.manifest, self.trained_on, self.recipe = state, manifest, trained_on, state.recipe
        self.progress = ProgressFile(rank.folder, self.accelerator.is_main_process)
        known = [identify(name, self.store, manifest, job.inception) for name in state.recipe.evaluation.extractors]
        device = self.accelerator.device
        self.extractors = [
            load_extractor(one, self.store, manifest, device, job.inception, job.shard_copies) for one in known
        ]
        size = state.recipe.data.image_size
        self.references = [
            load_reference(self.store, layout.reference(job.dataset, one.name, one.sha256, size))
            for one in self.extractors
        ]
        self.train = ShardImages(self.store, manifest, "train", size, job.shard_copies, memory_bytes=0)
        self.test = ShardImages(self.store, manifest, "test", size, job.shard_copies)

    def run(self) -> None:
        """Sample, score and draw: what the module says."""
        job, accelerator, indices = self.job, self.accelerator, range(self.recipe.evaluation.samples)
        weights, fid_by_weights = self.choose()
        denoiser = self.denoiser(weights)
        labels = self.labels(indices)
        images = self.sample(denoiser, indices, "sampling")
        features = [self.features(extractor, images) for extractor in self.extractors]
        bound, bits_of_images = None, np.zeros(0)
        if self.manifest.images.counted:
            count = self.recipe.evaluation.likelihood_images
            bound, bits_of_images = measure_bound(denoiser, self.test, count, accelerator, self.progress)
        scores = None
        if accelerator.is_main_process:
            scores = self.score(images, labels, features, bound, bits_of_images, weights, fid_by_weights)
        if accelerator.is_last_process:  # while the first one, where there are several, counts
            self.draw(denoiser, images, labels)
        accelerator.wait_for_everyone()
        if scores is not None:
            check_finite(scores)
            self.store.write(layout.scores(job.run, job.step, job.name), seal(scores))
        accelerator.wait_for_everyone()

    def denoiser(self, weights: str) -> Denoiser:
        """With the weights of that name."""
        return load_denoiser(self.store, self.state, self.trained_on, weights, self.accelerator.device)

    def sample(self, denoiser: Denoiser, indices: range, stage: str) -> Images:
        """The samples `indices`, of their classes, on every process."""
        return generate(denoiser, indices, self.labels(indices), self.accelerator, self.progress, stage)

    def features(self, extractor: Extractor, images: Images) -> NDArray[np.float32]:
        """Those of samples. Raises DataError if some are no finite numbers, which no figure could be made of."""
        found = embed_samples(extractor, images, self.accelerator)
        if not np.isfinite(found).all():
            raise no_numbers(self.job.step, ["the features of its samples"])
        return found

    def labels(self, indices: range) -> Labels | None:
        """The classes of samples. None for an unconditional network."""
        if not self.recipe.network.class_conditional:
            return None
        return in_proportion(self.class_counts, indices.stop)[indices.start :]

    @cached_property
    def class_counts(self) -> NDArray[np.int64]:
        """How many training images each class has, [classes]."""
        known = self.references[0].class_counts
        if known is None:
            known = np.bincount(self.train.labels(), minlength=len(self.manifest.images.classes))
        return known

    def choose(self) -> tuple[str, dict[str, float]]:
        """Which of the checkpoint's weights are scored: those with the lowest FID, and the FID of each if there is a choice."""
        job, recipe = self.job, self.recipe
        candidates = [job.weights] if job.weights else weights_to_try(recipe, job.step)
        if len(candidates) == 1:
            return candidates[0], {}
        # Others than the samples that are scored: a figure must not be of what it was chosen by.
        spare = range(recipe.evaluation.samples, recipe.evaluation.samples + recipe.evaluation.choice_samples)
        found = {}
        for weights in candidates:
            images = self.sample(self.denoiser(weights), spare, f"sampling {weights}")
            features = self.features(self.extractors[0], images)
            found[weights] = frechet_distance(Moments.of(features), self.references[0].train)
        return min(candidates, key=lambda name: found[name]), found

    def score(
        self,
        images: Images,
        labels: Labels | None,
        features: list[NDArray[np.float32]],
        bound: BoundTerms | None,
        bits_of_images: NDArray[np.float64],
        weights: str,
        fid_by_weights: dict[str, float],
    ) -> Scores:
        """The figures of the samples. Stores, at the training's end, what versions are compared by, and the closest images."""
        job, spec = self.job, self.manifest.images
        test_labels = self.test.labels()[: min(len(reference.test_features) for reference in self.references)]
        real = beside(labels, len(images), test_labels)
        real_labels = None if labels is None else test_labels[real]
        subjects = [
            Features(
                found, labels, reference, spec.classes, extractor.classify, reference.test_features[real], real_labels
            )
            for extractor, found, reference in zip(self.extractors, features, self.references, strict=True)
        ]
        deciding = subjects[0]
        closest = closest_pairs(images, deciding.copies, self.train)
        self.store.write(layout.picture(job.run, job.step, "closest", job.name), png(closest))
        train, test = (first_powers(spec.clipped(one) for one, _ in split.all()) for split in (self.train, self.test))
        test = test[beside(labels, len(images), test_labels[: len(test)])]
        rows = measured(Spectra(powers(images), train, test, labels))
        for extractor, subject in zip(self.extractors, subjects, strict=True):
            rows += measured(subject, extractor.name)
        if bound is not None:
            rows += measured(bound)
        evidence = None
        if self.ended:
            evidence = Evidence(deciding.samples, deciding.copies.close, bits_of_images, labels).to_bytes()
            self.store.write(layout.evidence(job.run, job.step, job.name), evidence)
        return Scores(
            step=job.step,
            images_seen=self.state.images_seen,
            checkpoint=self.state.digest,
            weights=weights,
            fid_by_weights=fid_by_weights,
            samples=self.recipe.evaluation.samples,
            real_samples=len(real),
            extractors=tuple(ScoredBy(name=one.name, sha256=one.sha256) for one in self.extractors),
            rows=tuple(rows),
            bound=bound,
            evidence_sha256=hashlib.sha256(evidence).hexdigest() if evidence else None,
            protocol=PROTOCOL,
        )

    @property
    def ended(self) -> bool:
        """Whether the checkpoint is the training's last."""
        return self.job.step == self.recipe.total_steps

    def draw(self, denoiser: Denoiser, images: Images, labels: Labels | None) -> None:
        """Store the pictures."""
        job = self.job
        with_noise = job.step == self.recipe.milestones[0] and not job.name
        final = self.ended and not job.name
        for name, picture in pictures(denoiser, images, labels, self.test, with_noise, final).items():
            self.store.write(layout.picture(job.run, job.step, name, job.name), png(picture))


def check_finite(scores: Scores) -> None:
    """Raises DataError if a figure is no finite number: it would be refused as it is read, and nobody would know why."""
    values = [(row.figure, row.value) for row in scores.rows]
    values += [("bits_per_dim", value) for value in (scores.bound.transitions if scores.bound else ())]
    lost = sorted({name for name, value in values if not math.isfinite(value)})
    if lost:
        raise no_numbers(scores.step, lost)


def no_numbers(step: int, lost: list[str]) -> DataError:
    """The error for a network whose samples can't be scored."""
    return DataError(
        f"Of step {step:,} these figures came out as no finite numbers: {', '.join(lost)}. The network draws nothing that "
        "can be scored: lower optimizer.learning_rate, or look at the loss and the gradients' norm in MLflow."
    )


def embed_samples(extractor: Extractor, images: Images, accelerator: Accelerator) -> NDArray[np.float32]:
    """Features of all images, [images, dimensions], on every process; the work is shared out in blocks."""
    sizes, like = block_sizes(len(images), EMBEDDING_BATCH), extractor.embed(images[:1])[0]
    return share_out(accelerator, sizes, lambda _, rows: extractor.embed(images[rows.start : rows.stop]), like)


JOB = EvaluationJob, score_checkpoint

if __name__ == "__main__":
    rank_main(*JOB)
