"""The model that MLflow loads: draws satellite patches. Models-from-code: MLflow runs this file, and finds the package
`diffusion` in the model's own `code/`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

import mlflow

MAX_IMAGES = 1024
BLOCK = 8


class Sampler(PythonModel):
    """predict([], params={"n": 8, "steps": 20, "seed": 0, "label": "Forest"}) -> uint8 [n, height, width, 3]."""

    def load_context(self, context: PythonModelContext) -> None:
        from safetensors.torch import load_file

        from diffusion.denoiser import Denoiser, Pixels, build_network
        from diffusion.recipe import Recipe

        recipe = Recipe.model_validate_json(Path(context.artifacts["recipe"]).read_bytes())
        dataset = json.loads(Path(context.artifacts["dataset"]).read_text())
        self.classes = dataset["classes"] if recipe.network.class_conditional else []
        network = build_network(recipe, len(dataset["classes"]))
        network.load_state_dict(load_file(context.artifacts["weights"]))
        pixels = Pixels(tuple(dataset["pixel_mean"]), tuple(dataset["pixel_std"]))
        self.denoiser = Denoiser(recipe, network.eval().requires_grad_(False), pixels)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        """Image i of a seed is the same whatever `n` is; without a label, image i is of class i modulo their number."""
        values = {
            "n": 8,
            "steps": self.denoiser.recipe.evaluation.sampler_steps,
            "seed": 0,
            "label": "",
            **(params or {}),
        }
        n, steps, seed, label = int(values["n"]), int(values["steps"]), int(values["seed"]), str(values["label"])
        if not 1 <= n <= MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(f"n is {n}; it must be between 1 and {MAX_IMAGES}.")
        if not 1 <= steps <= 1000:
            raise MlflowException.invalid_parameter_value(f"steps is {steps}; it must be between 1 and 1000.")
        if seed < 0:
            raise MlflowException.invalid_parameter_value(f"seed is {seed}; it must not be negative.")
        if label and label not in self.classes:
            raise MlflowException.invalid_parameter_value(
                f"label is '{label}'; it must be empty or one of {', '.join(self.classes) or '(the model knows no classes)'}."
            )
        # Blocks are always drawn whole: how many images the network sees at once can change how it rounds.
        blocks = [self._block(range(start, start + BLOCK), steps, seed, label) for start in range(0, n, BLOCK)]
        return np.concatenate(blocks)[:n]

    def _block(self, indices: range, steps: int, seed: int, label: str) -> np.ndarray:
        labels = None
        if self.classes:
            fixed = [self.classes.index(label)] if label else range(len(self.classes))
            labels = np.array([fixed[index % len(fixed)] for index in indices])
        return self.denoiser.sample(indices, labels, seed, steps)


mlflow.models.set_model(Sampler())
