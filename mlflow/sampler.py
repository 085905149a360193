"""The model that MLflow loads: draws images. Models-from-code: MLflow runs this file, and finds the package
`diffusion` in the model's own `code/`.
"""

import base64
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

import mlflow

MAX_IMAGES = 1024
MAX_EVALUATIONS = 50_000
"""Of the network, an image each, that one request may ask for: 1,024 images in 20 guided steps need 40,960."""
MAX_SECONDS = 600.0
"""After which a request is given up, whether or not somebody still waits for it: a server can't be ended before."""
SERVER_SECONDS = "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"
"""The variable that says after how many seconds the server itself has given it up."""
MAX_GUIDANCE = 20
BLOCK = 8
FORMATS = ("array", "png", "tiff", "npy")


class Sampler(PythonModel):
    """predict([], params={"n": 8, "steps": 20, "label": "Forest", "guidance": 2.0}) -> levels [n, height, width, bands].

    With another `format`, which suits a server's answer, n texts in base64: `png` of the three bands that people see, `tiff`
    or `npy` of all.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from safetensors.torch import load_file

        from diffusion.data.manifest import parse_manifest
        from diffusion.denoiser import Denoiser, SamplingPlan, build_network
        from diffusion.pixels import Pixels
        from diffusion.process.samplers import SAMPLERS
        from diffusion.recipe import Recipe

        self.plan = SamplingPlan
        self.samplers = list(SAMPLERS)
        recipe = Recipe.model_validate_json(Path(context.artifacts["recipe"]).read_bytes())
        dataset = Path(context.artifacts["dataset"])
        self.spec = parse_manifest(dataset.read_bytes(), dataset.name).images
        self.classes = list(self.spec.classes) if recipe.network.class_conditional else []
        network = build_network(recipe, self.spec)
        network.load_state_dict(load_file(context.artifacts["weights"]))
        self.denoiser = Denoiser(recipe, network.eval().requires_grad_(False), Pixels(self.spec))
        self.drawing = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> np.ndarray | list[str]:
        """Image i of a seed is the same whatever `n` is; without a label, image i is of class i modulo their number."""
        evaluation = self.denoiser.recipe.evaluation
        values = {
            "n": 8,
            "steps": evaluation.sampler_steps,
            "sampler": evaluation.sampler,
            "seed": 0,
            "label": "",
            "guidance": evaluation.guidance,
            "format": "array",
            **(params or {}),
        }
        n, steps, seed, label = int(values["n"]), int(values["steps"]), int(values["seed"]), str(values["label"])
        sampler, guidance = str(values["sampler"]), float(values["guidance"])
        if not 1 <= n <= MAX_IMAGES:
            raise MlflowException.invalid_parameter_value(f"n is {n}; it must be between 1 and {MAX_IMAGES}.")
        if not 1 <= steps <= 1000:
            raise MlflowException.invalid_parameter_value(f"steps is {steps}; it must be between 1 and 1000.")
        if not 0 <= seed < 2**63:
            raise MlflowException.invalid_parameter_value(f"seed is {seed}; it must be between 0 and 2^63 - 1.")
        if sampler not in self.samplers:
            raise MlflowException.invalid_parameter_value(
                f"sampler is {sampler[:40]!r}; it must be one of {', '.join(self.samplers)}."
            )
        if not 0 <= guidance <= MAX_GUIDANCE:
            raise MlflowException.invalid_parameter_value(
                f"guidance is {guidance}; it must be between 0 and {MAX_GUIDANCE}."
            )
        if guidance != 1 and self.denoiser.recipe.needs_class:
            raise MlflowException.invalid_parameter_value(
                f"guidance is {guidance}; it must be 1: this network was told the class of every image, and can't do without."
            )
        if label and label not in self.classes:
            raise MlflowException.invalid_parameter_value(
                f"label is {label[:40]!r}; it must be empty or one of {', '.join(self.classes) or '(the model knows no classes)'}."
            )
        if values["format"] not in FORMATS:
            raise MlflowException.invalid_parameter_value(
                f"format is {str(values['format'])[:40]!r}; it must be one of {', '.join(FORMATS)}."
            )
        passes = 2 if self.classes and guidance != 1 else 1
        # Blocks are always drawn whole: how many images the network sees at once can change how it rounds.
        starts = range(0, n, BLOCK)
        if (asked := len(starts) * BLOCK * steps * passes) > MAX_EVALUATIONS:
            raise MlflowException.invalid_parameter_value(
                f"{n} images in {steps} steps{' with guidance' if passes > 1 else ''} are {asked:,} evaluations of the network; "
                f"{MAX_EVALUATIONS:,} are the most. Ask for fewer images or steps at once."
            )
        # Before the server does, which could not say why; and for nobody, others would wait.
        seconds = min(MAX_SECONDS, max(1.0, float(os.environ.get(SERVER_SECONDS) or "inf") - 2))
        deadline = time.monotonic() + seconds
        # One request at a time: together they would take longer, and more memory.
        if not self.drawing.acquire(timeout=seconds):
            raise MlflowException(
                f"Other requests took more than {seconds:.0f} s. Try again later.", TEMPORARILY_UNAVAILABLE
            )
        try:
            blocks = [
                self.denoiser.sample(
                    range(start, start + BLOCK),
                    self._labels(range(start, start + BLOCK), label),
                    seed,
                    self.plan(steps, sampler, guidance=guidance),
                    watch=lambda *_: _check(deadline),
                )
                for start in starts
            ]
        finally:
            self.drawing.release()
        images = np.concatenate(blocks)[:n]
        return images if values["format"] == "array" else [self._encoded(image, values["format"]) for image in images]

    def _encoded(self, image: np.ndarray, kind: str) -> str:
        """The image as a file of that kind, in base64."""
        buffer = io.BytesIO()
        if kind == "png":
            Image.fromarray(self.spec.display(image)).save(buffer, "PNG")
        elif kind == "npy":
            fields = np.dtype([(band, image.dtype) for band in self.spec.bands])
            np.save(buffer, np.ascontiguousarray(image).view(fields)[..., 0], allow_pickle=False)
        else:
            import tifffile

            named = json.dumps({"bands": self.spec.bands})
            layout = {"planarconfig": "contig"} if len(self.spec.bands) > 1 else {}
            plane = image if len(self.spec.bands) > 1 else image[..., 0]
            tifffile.imwrite(buffer, plane, photometric="minisblack", description=named, **layout)
        return base64.b64encode(buffer.getvalue()).decode()

    def _labels(self, indices: range, label: str) -> np.ndarray | None:
        if not self.classes:
            return None
        fixed = [self.classes.index(label)] if label else range(len(self.classes))
        return np.array([fixed[index % len(fixed)] for index in indices])


def _check(deadline: float) -> None:
    """Before each evaluation of the network. Raises MlflowException after the deadline."""
    if time.monotonic() > deadline:
        raise MlflowException(
            "The request took too long, with what it waited for others, and was given up. Ask for fewer images or steps at once, "
            "or have the server wait longer (--timeout, up to 600 s).",
            TEMPORARILY_UNAVAILABLE,
        )


mlflow.models.set_model(Sampler())
