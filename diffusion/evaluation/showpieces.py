"""What people look at beside the grid: how a sample comes out of noise, what lies between two samples, real images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.data.loader import ShardImages
from diffusion.data.spec import Images
from diffusion.denoiser import Denoiser
from diffusion.evaluation.pictures import GRID_COLUMNS, class_grid
from diffusion.randomness import stream

SEED = 0


def trajectory(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a sample: the noisy image at GRID_COLUMNS moments of its walk, the last column the sample itself."""
    seen: list[Images] = []

    def watch(x_t: Tensor, _: Tensor) -> None:
        seen.append(denoiser.pixels.decode(x_t))

    end = denoiser.draw(_noise(denoiser, range(len(rows)), 0), labels, _steps(denoiser, len(rows)), watch=watch)
    moments = np.linspace(0, len(seen) - 1, GRID_COLUMNS - 1).round().astype(int)
    return class_grid(denoiser.pixels.spec.display(np.concatenate([*(seen[k] for k in moments), end])), rows)


def interpolation(denoiser: Denoiser, labels: NDArray[np.int64] | None, rows: list[str]) -> Image.Image:
    """A row a pair: GRID_COLUMNS samples whose starting noise lies on the arc between the noise of the two at the ends."""
    first, last = (_noise(denoiser, range(len(rows)), which) for which in (0, 1))
    columns = []
    for share in np.linspace(0, 1, GRID_COLUMNS):
        # Along a quarter of a circle the noise keeps its variance of one.
        start = np.cos(share * np.pi / 2) * first + np.sin(share * np.pi / 2) * last
        columns.append(denoiser.draw(start.float(), labels, _steps(denoiser, len(rows))))
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


def _noise(denoiser: Denoiser, indices: range, which: int) -> Tensor:
    size, bands = denoiser.recipe.data.image_size, len(denoiser.pixels.spec.bands)
    draws = [
        stream(SEED, "showpiece", index, which).standard_normal((bands, size, size), np.float32) for index in indices
    ]
    return torch.from_numpy(np.stack(draws))


def _steps(denoiser: Denoiser, count: int):  # type: ignore[no-untyped-def]
    return lambda k: _noise(denoiser, range(count), 2 + k).to(denoiser.device)
