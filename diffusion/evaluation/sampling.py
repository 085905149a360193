"""Samples of a checkpoint, on any number of processes: the same ones however the work is shared out."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator

from diffusion.data.manifest import Manifest
from diffusion.data.spec import Images
from diffusion.denoiser import Denoiser, build_network
from diffusion.evaluation.labels import Labels
from diffusion.evaluation.sharding import block_sizes, gather_rows
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
    mine = range(accelerator.process_index, len(sizes), accelerator.num_processes)
    blocks = {}
    for done, block in enumerate(mine, start=1):
        start = block * recipe.evaluation.batch
        part = slice(start, start + sizes[block])
        drawn = denoiser.sample(indices[part], None if labels is None else labels[part], SEED)
        blocks[block] = torch.from_numpy(drawn.astype(SENT_AS[spec.dtype], copy=False))
        progress.write(stage, done, len(mine))
    like = torch.from_numpy(np.zeros(spec.shape(recipe.data.image_size), SENT_AS[spec.dtype]))
    return gather_rows(accelerator, blocks, sizes, like).astype(spec.dtype, copy=False)
