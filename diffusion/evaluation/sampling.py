"""Samples of a checkpoint, on any number of processes: the same ones however the work is shared out."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion.data.manifest import Manifest
from diffusion.data.spec import Images, Labels
from diffusion.denoiser import Denoiser, build_network
from diffusion.evaluation.sharding import block_sizes, share_out
from diffusion.jobs.reports import ProgressFile
from diffusion.model.placement import place
from diffusion.pixels import Pixels
from diffusion.store.objects import Store
from diffusion.training.checkpoint import load_tensors
from diffusion.training.state import CheckpointState

SEED = 0
SENT_AS = {"uint8": "uint8", "uint16": "int32", "float32": "float32"}
"""What levels travel as between processes, which know no uint16."""


def load_denoiser(
    store: Store, state: CheckpointState, manifest: Manifest, weights: str, device: torch.device
) -> Denoiser:
    """The denoiser of a checkpoint with the weights of that name: `model`, or a moving average's."""
    network = build_network(state.recipe, manifest.images)
    network.load_state_dict(load_tensors(store, state, weights))
    network = place(network.eval().requires_grad_(False), device)
    return Denoiser(state.recipe, network, Pixels(manifest.images))


def generate(
    denoiser: Denoiser,
    indices: range,
    labels: Labels | None,
    accelerator: Accelerator,
    progress: ProgressFile,
    stage: str,
) -> Images:
    """These samples of these classes, on every process; from the same noise for every model, so that they compare."""
    recipe, spec = denoiser.recipe, denoiser.pixels.spec
    sizes = block_sizes(len(indices), recipe.evaluation.batch)

    def drawn(_: int, rows: range) -> Tensor:
        part = slice(rows.start, rows.stop)
        levels = denoiser.sample(indices[part], None if labels is None else labels[part], SEED)
        return torch.from_numpy(levels.astype(SENT_AS[spec.dtype], copy=False))

    like = torch.from_numpy(np.zeros(spec.shape(recipe.data.image_size), SENT_AS[spec.dtype]))
    samples = share_out(accelerator, sizes, drawn, like, partial(progress.write, stage))
    return samples.astype(spec.dtype, copy=False)
