"""How nearly real patches have the symmetries of the square: KID of real images against other real ones, turned.

    python -m benchmarks.symmetry

Half of the training images are turned, the other half are not. Three sets of features: the shipped extractor's (trained on all
eight symmetries, so that it hardly sees them), the pixels of the image halved twice, and differences of neighbouring pixels, whose
sign is where the light comes from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.sources.find import EUROSAT, find_archive, read_source
from diffusion.evaluation.statistics import kernel_distance
from diffusion.features.extractor import shipped
from diffusion.randomness import stream
from diffusion.settings import settings
from diffusion.store.objects import open_store

SAMPLES = 6000  # of each side

Images = NDArray[np.uint8]


def symmetries() -> dict[str, tuple[int, bool]]:
    """Name -> quarter turns (counter-clockwise), after mirroring left to right or not."""
    turned = {"": 0, "quarter turn": 1, "half turn": 2, "three quarters": 3}
    named = {}
    for mirrored in (False, True):
        for name, quarters in turned.items():
            words = [part for part in ("mirrored" if mirrored else "", name) if part]
            named[", ".join(words) or "as it is"] = (quarters, mirrored)
    return named


def apply(images: Images, quarters: int, mirrored: bool) -> Images:
    """One symmetry of the square, on images [n, height, width, 3]."""
    return np.rot90(images[:, :, ::-1] if mirrored else images, quarters, axes=(1, 2))


def pixels(images: Images) -> NDArray[np.float64]:
    """Means over squares of 4 x 4 pixels, standardised: [n, height / 4 * width / 4 * 3]."""
    n, height, width, _ = images.shape
    small = images.reshape(n, height // 4, 4, width // 4, 4, 3).mean(axis=(2, 4)).reshape(n, -1)
    return (small - small.mean()) / small.std()


def differences(images: Images) -> NDArray[np.float64]:
    """How much steeper brightness rises than falls, down and to the right: the share of large steps that rise, less the
    share that fall, in units of its spread over images: [n, 2]."""
    grey = images.astype(np.float64).mean(axis=3)
    features = []
    for axis in (1, 2):
        step = np.diff(grey, axis=axis).reshape(len(grey), -1)
        scaled = step / np.maximum(step.std(axis=1, keepdims=True), 1.0)
        features.append(((scaled > 2).mean(axis=1) - (scaled < -2).mean(axis=1)) / 0.01)
    return np.stack(features, axis=1)


def main() -> None:
    environment = settings()
    store = open_store(environment.store_uri)
    dataset = ingest(read_source(EUROSAT, find_archive(EUROSAT, environment)), store)
    shards = ShardImages(store, dataset, "train", 64, Path(environment.shard_copies), memory_bytes=0)
    images = np.concatenate([found for found, _ in shards.all()])
    images = images[stream(0, "symmetry").permutation(len(images))]
    half = len(images) // 2
    extractor = shipped(torch.device("cpu"))
    views = {
        "extractor": lambda these: extractor.embed(these).numpy(),
        "pixels": pixels,
        "differences": differences,
    }
    print("| symmetry | " + " | ".join(f"KID x 1000, {name}" for name in views) + " |")
    print("| --- |" + " --- |" * len(views))
    plain = {name: view(images[:SAMPLES]) for name, view in views.items()}
    for name, (quarters, mirrored) in symmetries().items():
        other = np.ascontiguousarray(apply(images[half : half + SAMPLES], quarters, mirrored))
        cells = []
        for view_name, view in views.items():
            kid, error = kernel_distance(plain[view_name], view(other), samples=SAMPLES)
            cells.append(f"{1000 * kid:.1f} ± {1000 * error:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
