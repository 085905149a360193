"""What ranks import, once: `tests.ranks` has it imported where they are forked from."""

import accelerate  # noqa: F401
import torch
import torch._dynamo

import diffusion.evaluation.job
import diffusion.evaluation.measure_reference
import diffusion.training.loop  # noqa: F401
import mlflow  # noqa: F401
import tests.faults.caller  # noqa: F401

torch.set_num_threads(1)  # a fork has no threads but its own
