"""What people look at: the grid of samples, how one comes out of noise, what lies between two, what training images are nearest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.spec import Images, Labels
from diffusion.denoiser import Denoiser
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid, row_names
from diffusion.evaluation.sampling import SEED
from diffusion.evaluation.statistics import Memorisation

PAIRS = 10
"""Of a sample and the training image that is nearest to it."""


def pictures(
    denoiser: Denoiser, images: Images, labels: Labels | None, test: ShardImages, with_noise: bool, final: bool
) -> dict[str, Image.Image]:
    """What people look at, by name: a grid of the samples; the noise that they began as; at the end the showpieces."""
    spec, recipe = denoiser.pixels.spec, denoiser.recipe
    names = row_names(spec, recipe.network.class_conditional)
    rows = np.arange(len(names)) % len(spec.classes) if recipe.network.class_conditional else None
    # Fixed by the samples' indices: the same noise at every milestone.
    if labels is not None and any(names):
        shown, sampled = first_of_each(labels, names)
    else:
        shown, sampled = [*range(min(len(images), GRID_COLUMNS * len(names)))], names
    found = {"grid": class_grid(spec.display(images[shown]), sampled)}
    if with_noise:
        noise = denoiser.pixels.decode(denoiser.start(shown, SEED))
        found["noise"] = class_grid(spec.display(noise), sampled)
    if final:
        found["trajectory"] = trajectory(denoiser, rows, names)
        found["interpolation"] = interpolation(denoiser, rows, names)
        found["real"] = real_images(test, names)
    return found


def first_of_each(labels: Labels, names: list[str]) -> tuple[list[int], list[str]]:
    """The samples that a grid shows, the first of each class, a column after the other; and its rows, the classes that have any.

    A class with fewer than the others shows them again.
    """
    own = {name: np.flatnonzero(labels == label) for label, name in enumerate(names) if (labels == label).any()}
    columns = min(GRID_COLUMNS, max(map(len, own.values())))
    return [int(found[column % len(found)]) for column in range(columns) for found in own.values()], [*own]


def closest_pairs(images: Images, copies: Memorisation, train: ShardImages) -> Image.Image:
    """The samples that lie nearest to a training image, above these images."""
    chosen = np.argsort(copies.distances)[:PAIRS]
    starts = np.cumsum([0, *(shard.samples for shard in train.shards)])
    nearest = copies.nearest[chosen]
    shards = np.searchsorted(starts, nearest, side="right") - 1
    real, _ = train.take(shards, nearest - starts[shards])
    pairs = np.stack([images[chosen], real], axis=1).reshape(-1, *images.shape[1:])
    return class_grid(train.spec.display(pairs), ["sample", "nearest real"])


def trajectory(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a sample: the noisy image at GRID_COLUMNS moments of its walk, the last column the sample itself."""
    seen: list[Images] = []

    def watch(x_t: Tensor, _: Tensor) -> None:
        seen.append(denoiser.pixels.decode(x_t))

    end = denoiser.draw(_noise(denoiser, rows, 0), labels, lambda k: _noise(denoiser, rows, 2 + k), watch=watch)
    moments = np.linspace(0, len(seen) - 1, GRID_COLUMNS - 1).round().astype(int)
    return class_grid(denoiser.pixels.spec.display(np.concatenate([*(seen[k] for k in moments), end])), rows)


def interpolation(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a pair: GRID_COLUMNS samples whose starting noise lies on the arc between the noise of the two at the ends."""
    first, last = (_noise(denoiser, rows, which).cpu() for which in (0, 1))
    columns = []
    for share in np.linspace(0, 1, GRID_COLUMNS):
        # Along a quarter of a circle the noise keeps its variance of one.
        start = np.cos(share * np.pi / 2) * first + np.sin(share * np.pi / 2) * last
        columns.append(denoiser.draw(start.float(), labels, lambda k: _noise(denoiser, rows, 2 + k)))
    return class_grid(denoiser.pixels.spec.display(np.concatenate(columns)), rows)


def real_images(images: ShardImages, rows: list[str]) -> Image.Image:
    """The first GRID_COLUMNS real images of each class that has any, as a grid like that of samples; rows without names: any."""
    named = any(rows) and list(images.spec.classes) == rows
    found: dict[int, list[Images]] = {row: [] for row in range(len(rows))}
    for index in range(len(images.shards)):
        for number, (image, label) in enumerate(zip(*images.shard(index), strict=True)):
            own = found[int(label) if named else number % len(rows)]
            if len(own) < GRID_COLUMNS:
                own.append(image)
        if all(len(own) == GRID_COLUMNS for own in found.values()):
            break
    shown = {rows[row]: own for row, own in found.items() if own} if named else None
    lists = list(shown.values()) if shown else [own for own in found.values() if own]
    columns = min(map(len, lists))
    pixels = np.stack([own[k] for k in range(columns) for own in lists])
    return class_grid(images.spec.display(pixels), list(shown) if shown else [""] * len(lists))


def _noise(denoiser: Denoiser, rows: list[str], which: int) -> Tensor:
    return denoiser.noise(range(len(rows)), SEED, "showpiece", which)
