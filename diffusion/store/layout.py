"""The name of every object in the store. No other module makes one.

    datasets/DIGEST/                   shards, and manifest.json, which makes them a dataset
    extractors/DATASET/                a dataset's own feature network
    references/                        features of real images, by all that they were computed from
    checkpoints/RUN/STEP/              tensors, the journal, and state.json, which makes them a checkpoint
    runs/RUN/evaluations/STEP[-NAME]/  pictures, evidence.safetensors, and scores.json, which makes them an evaluation
    runs/RUN/seen-…                    markers by which hosts see whether they share a store
    promotions/MODEL/                  the log of promotions

Names stay: what was written under them is read by every later version.
"""

from __future__ import annotations

import hashlib
import json

STATE = "state.json"
"""Of a checkpoint, written last."""
PROMOTIONS = "promotions/"
OWN_VERSION = 1
"""Of how a dataset's own extractor is trained."""
REFERENCE_VERSION = 2
"""Of how a reference is measured."""


def dataset(digest: str) -> str:
    """The folder of a dataset."""
    return f"datasets/{digest}"


def manifest(digest: str) -> str:
    """A dataset's manifest, written last."""
    return f"{dataset(digest)}/manifest.json"


def own_extractor(digest: str) -> str:
    """The document of a dataset's own extractor, written after its weights."""
    return f"extractors/{digest}/own-{OWN_VERSION}.json"


def own_extractor_weights(digest: str, sha256: str) -> str:
    """Its weights: by their digest, since two runs may train it at once, and the first document counts."""
    return f"extractors/{digest}/own-{OWN_VERSION}-{sha256[:16]}.safetensors"


def reference(digest: str, extractor: str, sha256: str, image_size: int) -> str:
    """What an extractor makes of a dataset's images at a size: named by all that it was computed from."""
    key = json.dumps([REFERENCE_VERSION, digest, extractor, sha256, image_size])
    return f"references/{extractor}-{image_size}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def reference_seal(reference: str) -> str:
    """The document beside a reference's tensors, written after them."""
    return f"{reference.removesuffix('.safetensors')}.json"


def checkpoints(run: str) -> str:
    """What the names of all checkpoints of a run begin with."""
    return f"checkpoints/{run}/"


def checkpoint(run: str, step: int) -> str:
    """The folder of a checkpoint."""
    return f"{checkpoints(run)}{step:09d}"


def evaluations(run: str) -> str:
    """What the names of all that a run's evaluations have left begin with."""
    return f"runs/{run}/evaluations/"


def evaluation(run: str, step: int, name: str = "") -> str:
    """The folder of an evaluation; `name` tells those apart that are not the recipe's own."""
    return f"{evaluations(run)}{step:09d}{'-' if name else ''}{name}"


def scores(run: str, step: int, name: str = "") -> str:
    """An evaluation's figures, written last."""
    return f"{evaluation(run, step, name)}/scores.json"


def evidence(run: str, step: int, name: str = "") -> str:
    """What two versions are compared by."""
    return f"{evaluation(run, step, name)}/evidence.safetensors"


def picture(run: str, step: int, picture: str, name: str = "") -> str:
    """One of an evaluation's pictures."""
    return f"{evaluation(run, step, name)}/{picture}.png"


def marker(run: str, unique: str) -> str:
    """What a cluster's driver writes, for every host to find."""
    return f"runs/{run}/seen-{unique}"


def promotion(model: str, number: int) -> str:
    """An entry of the log of promotions."""
    return f"{PROMOTIONS}{model}/{number:06d}.json"


def promotion_applied(model: str, number: int) -> str:
    """That the alias was moved as the entry says."""
    return f"{PROMOTIONS}{model}/{number:06d}.applied"
