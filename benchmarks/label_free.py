"""What features know that were learnt without classes: how well a linear classifier tells EuroSAT's classes by them.

    python -m benchmarks.label_free EuroSAT.zip [--images 4000]

Networks alike, trained on the same images for as long: by telling views of one image from others' (what a dataset without classes
gets), by telling which way images were turned (Gidaris et al. 2018, arXiv:1803.07728), by telling the classes, to compare, and not at
all. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.codecs import decode
from diffusion.data.sources.eurosat import read_eurosat
from diffusion.data.spec import Images
from diffusion.features.classifier import Classifier, fuse
from diffusion.features.learning import Labelled, coarsen, fit, tell_classes, tell_views
from diffusion.features.train_extractor import OWN_BUDGET, OWN_EPOCHS, VIEW_OUTPUTS

TESTED = 0.2
RIDGES = (1.0, 10.0, 100.0)


def tell_turns(network: Classifier, images: Tensor, _: Tensor, rng: torch.Generator) -> Tensor:
    """How far it is from telling by how many quarters each image was turned."""
    turns = torch.randint(4, (len(images),), generator=rng)
    turned = images.clone()
    for quarters in range(1, 4):
        turned[turns == quarters] = torch.rot90(images[turns == quarters], quarters, (2, 3))
    return F.cross_entropy(network(coarsen(turned, rng)), turns)


def some_images(archive: Path, count: int) -> Labelled:
    """As many images of each class, standardised, in random order."""
    source, rng = read_eurosat(archive), np.random.default_rng(0)
    by_class = {name: [one for one in source.images if one.class_name == name] for name in source.classes}
    chosen = [
        (one, label)
        for label, name in enumerate(source.classes)
        for one in rng.permutation(np.array(by_class[name], dtype=object))[: count // len(source.classes)]
    ]
    pixels = np.stack([decode(one.read(), one.file_name).array for one, _ in chosen])
    order = rng.permutation(len(chosen))
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))
    images = ((pixels[order] - mean) / std).astype(np.float32)
    return Labelled(images, torch.tensor([label for _, label in chosen])[order], channels_first)


def channels_first(images: Images) -> Tensor:
    """[n, height, width, bands] -> [n, bands, height, width]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def told_by(network: Classifier, data: Labelled, trained: int) -> float:
    """Share of the images after the first `trained` whose class a ridge regression on the features of these tells (the best ridge)."""
    with torch.no_grad():
        parts = [data.some(slice(start, start + 500))[0] for start in range(0, len(data), 500)]
        features = torch.cat([network.features(part) for part in parts]).numpy().astype(np.float64)
    known = features[:trained]
    features = (features - known.mean(axis=0)) / (known.std(axis=0) + 1e-6)
    rows: NDArray[np.float64] = np.c_[features, np.ones(len(features))]
    labels = data.labels.numpy()
    wanted, gram = np.eye(labels.max() + 1)[labels[:trained]], rows[:trained].T @ rows[:trained]

    def right(ridge: float) -> float:
        weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), rows[:trained].T @ wanted)
        return float(((rows[trained:] @ weights).argmax(axis=1) == labels[trained:]).mean())

    return max(map(right, RIDGES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    arguments = parser.parse_args()
    data = some_images(arguments.archive, arguments.images)
    trained, classes = int(len(data) * (1 - TESTED)), int(data.labels.max()) + 1
    part = Labelled(data.images[:trained], data.labels[:trained], data.encode)
    torch.manual_seed(0)
    print(
        f"{'not trained':12} {told_by(fuse(Classifier(3, classes, fused=False).eval()), data, trained):.1%}", flush=True
    )
    ways = {
        "views": (tell_views, VIEW_OUTPUTS, 2),
        "turns": (tell_turns, 4, 1),
        "classes": (tell_classes, classes, 1),
    }
    for name, (loss, outputs, looks) in ways.items():
        epochs, began = max(1, min(OWN_EPOCHS, OWN_BUDGET // looks // trained)), time.monotonic()
        network = fit(part, outputs, epochs, torch.device("cpu"), loss, lambda epoch, mean: None)
        print(f"{name:12} {told_by(network, data, trained):.1%}  {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
