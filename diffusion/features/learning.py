"""How a classifier whose features samples are judged by learns: to tell classes or, where there are none, views of one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion.data.spec import Images
from diffusion.features.classifier import Classifier, fuse
from diffusion.model.placement import place

BATCH = 128
PEAK_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.02
HALF_RESOLUTION_SHARE = 0.3
TEMPERATURE = 0.2
SMALLEST_PART = 0.35  # of an image's side
JITTER = 0.2  # of the bands' brightness, in their standard deviations


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """One random symmetry of the square for each image, and half the resolution for some: recipes of half the size are scored too."""
    choice = torch.randint(8, (len(images),), generator=rng)
    out = images.clone()
    for symmetry in range(8):
        chosen = images[choice == symmetry]
        turned = torch.rot90(chosen, symmetry % 4, (2, 3))
        out[choice == symmetry] = turned.flip(3) if symmetry >= 4 else turned
    return coarsen(out, rng)


def coarsen(out: Tensor, rng: torch.Generator) -> Tensor:
    """The images, some of them at half the resolution."""
    coarse = torch.rand(len(out), generator=rng) < HALF_RESOLUTION_SHARE
    if coarse.any():
        out[coarse] = F.interpolate(F.avg_pool2d(out[coarse], 2), size=out.shape[-2:], mode="bilinear")
    return out


@dataclass(frozen=True)
class Labelled:
    """Images as their files have them, a few of which at a time become what the network sees."""

    images: Images
    labels: Tensor
    """[n]"""
    encode: Callable[[Images], Tensor]
    """Levels [batch, height, width, bands] -> [batch, bands, height, width]."""

    def __len__(self) -> int:
        return len(self.images)

    def some(self, chosen: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images [batch, bands, height, width] and labels [batch]."""
        places = chosen.numpy() if isinstance(chosen, Tensor) else chosen
        return self.encode(self.images[places]), self.labels[chosen]


@torch.no_grad()
def accuracy(network: Classifier, known: Labelled, seen: Callable[[Tensor], Tensor] = lambda images: images) -> float:
    """Share of correct classes. `seen`: how the network sees the images."""
    right = 0
    for start in range(0, len(known), 500):
        images, truth = known.some(slice(start, start + 500))
        right += int((network(seen(images)).argmax(1) == truth).sum())
    return right / len(known)


LossOf = Callable[[Classifier, Tensor, Tensor, torch.Generator], Tensor]
"""Of a network, on the images and labels of a batch, with draws of its own."""


def fit(
    train: Labelled,
    classes: int,
    epochs: int,
    device: torch.device,
    loss_of: LossOf,
    on_epoch: Callable[[int, float], None],
) -> Classifier:
    """A classifier of these images, fused, its weights rounded to float16 as they are stored.

    Args:
        loss_of: what it is to learn.
        on_epoch: called after each epoch with its number and mean loss.
    """
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = place(Classifier(train.images.shape[-1], classes, fused=False), device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batch = min(BATCH, len(train))
    steps_per_epoch = len(train) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=0.2
    )
    for epoch in range(epochs):
        total = 0.0
        network.train()
        order = torch.randperm(len(train), generator=rng)
        for step in range(steps_per_epoch):
            chosen = order[step * batch : (step + 1) * batch]
            loss = loss_of(network, *train.some(chosen), rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        on_epoch(epoch + 1, total / steps_per_epoch)
    return fuse(network.eval().cpu()).half().float()


def tell_classes(network: Classifier, images: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """How far it is from telling the classes of images that were turned and mirrored."""
    said = network(_placed(network, augment(images, rng)))
    return F.cross_entropy(said, labels.to(said.device))


def tell_views(network: Classifier, images: Tensor, _: Tensor, rng: torch.Generator) -> Tensor:
    """How far it is from telling which two of twice as many views are of one image (Chen et al. 2020, arXiv:2002.05709, eq. 1)."""
    towards = F.normalize(network(_placed(network, torch.cat([view(images, rng), view(images, rng)]))), dim=1)
    alike = towards @ towards.T / TEMPERATURE
    own = torch.eye(len(towards), dtype=torch.bool, device=alike.device)
    other = torch.arange(len(towards), device=alike.device).roll(len(images))
    return F.cross_entropy(alike.masked_fill(own, -torch.inf), other)


def _placed(network: Classifier, images: Tensor) -> Tensor:
    return images.to(network.head.weight.device).contiguous(memory_format=torch.channels_last)


def view(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image as it might have been taken as well: a part of it, mirrored or not, each band brighter or darker; some coarser.

    Not turned: which way is up may matter.
    """
    count, bands = images.shape[:2]
    scale = SMALLEST_PART + (1 - SMALLEST_PART) * torch.rand(count, generator=rng)
    across, down = (1 - scale) * (2 * torch.rand(2, count, generator=rng) - 1)
    mirror = 1 - 2 * (torch.rand(count, generator=rng) < 0.5).float()
    none = torch.zeros(count)
    where = torch.stack([scale * mirror, none, across, none, scale, down], dim=1).reshape(count, 2, 3)
    grid = F.affine_grid(where, list(images.shape), align_corners=False)
    part = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain, shift = JITTER * torch.randn(2, count, bands, 1, 1, generator=rng)
    return coarsen(part * torch.exp(gain) + shift, rng)


@torch.no_grad()
def views_told(network: Classifier, known: Labelled) -> tuple[float, float]:
    """Share of images, of as many as a batch has, whose other view is the most alike; and what guessing would reach."""
    (images, _), rng = known.some(slice(BATCH)), torch.Generator().manual_seed(1)
    first, second = (F.normalize(network(view(images, rng)), dim=1) for _ in range(2))
    told = (first @ second.T).argmax(dim=1) == torch.arange(len(images))
    return float(told.float().mean()), 1 / len(images)


def as_stored(network: Classifier) -> dict[str, Tensor]:
    """Its weights as the file of an extractor has them: float16."""
    return {name: value.half().contiguous() for name, value in network.state_dict().items()}
