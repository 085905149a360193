"""What people look at beside the grid: how a sample comes out of noise, what lies between two samples, real images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.denoiser import Denoiser
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid
from diffusion.randomness import stream

SEED = 0


def trajectory(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a sample: the noisy image at GRID_COLUMNS moments of its walk, the last column the sample itself."""
    seen: list[NDArray[np.uint8]] = []

    def watch(x_t: Tensor, _: Tensor) -> None:
        seen.append(denoiser.pixels.decode(x_t))

    end = denoiser.draw(_noise(denoiser, range(len(rows)), 0), labels, _steps(denoiser, len(rows)), watch=watch)
    moments = np.linspace(0, len(seen) - 1, GRID_COLUMNS - 1).round().astype(int)
    return class_grid(np.concatenate([*(seen[k] for k in moments), end]), rows)


def interpolation(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a pair: GRID_COLUMNS samples whose starting noise lies on the arc between the noise of the two at the ends."""
    first, last = (_noise(denoiser, range(len(rows)), which) for which in (0, 1))
    columns = []
    for share in np.linspace(0, 1, GRID_COLUMNS):
        # Along a quarter of a circle the noise keeps its variance of one.
        start = np.cos(share * np.pi / 2) * first + np.sin(share * np.pi / 2) * last
        columns.append(denoiser.draw(start.float(), labels, _steps(denoiser, len(rows))))
    return class_grid(np.concatenate(columns), rows)


def real_images(images: ShardImages, classes: list[str]) -> Image.Image:
    """The first GRID_COLUMNS real images of each class that has any, as a grid like that of samples."""
    found: dict[int, list[NDArray[np.uint8]]] = {label: [] for label in range(len(classes))}
    for index in range(len(images.shards)):
        for image, label in zip(*images.shard(index), strict=True):
            if len(found[int(label)]) < GRID_COLUMNS:
                found[int(label)].append(image)
        if all(len(own) == GRID_COLUMNS for own in found.values()):
            break
    shown = {classes[label]: own for label, own in found.items() if own}
    columns = min(map(len, shown.values()))
    return class_grid(np.stack([own[k] for k in range(columns) for own in shown.values()]), list(shown))


def _noise(denoiser: Denoiser, indices: range, which: int) -> Tensor:
    size = denoiser.recipe.data.image_size
    draws = [stream(SEED, "showpiece", index, which).standard_normal((3, size, size), np.float32) for index in indices]
    return torch.from_numpy(np.stack(draws))


def _steps(denoiser: Denoiser, count: int):  # type: ignore[no-untyped-def]
    return lambda k: _noise(denoiser, range(count), 2 + k).to(denoiser.device)
