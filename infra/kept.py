"""What a start of the servers hands on to the next one: the settings that it ran with, and that its data lies elsewhere."""

from __future__ import annotations

import json
import os

from databases import PLACES, is_own
from processes import HOME, STACK

from diffusion.trust.private import write_private

ELSEWHERE = STACK / "kept-elsewhere"
"""Names of the variables by which the last start was told to keep things outside `var/`."""
KEPT = (
    "AWS_",
    "RAY_",
    "EUROSAT_",
    "CUDA_VISIBLE_DEVICES",
    "TRAIN_DIFFUSION_",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    "MLFLOW_BACKEND_STORE_URI",
)
"""Beginnings of the names of settings that a new start takes over from what runs."""
SETTINGS = STACK / "service.json"
NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
)
"""How the world outside is reached: taken over as well."""
OF_THE_SHELL = ("AUTH", "PREFECT_PORT", "MLFLOW_PORT", "RAY_PORT", *NETWORK)
"""And those that `make service` keeps besides."""


def keep_settings() -> None:
    """Note the settings of this shell, with which `make service` starts all of it again."""
    told = {name: value for name, value in os.environ.items() if name.startswith(KEPT) or name in OF_THE_SHELL}
    write_private(SETTINGS, json.dumps(told, indent=1))


def note_places() -> None:
    """Note which of these lie outside `var/`: the next start must be told as well."""
    write_private(ELSEWHERE, "\n".join(place for place in PLACES if not is_own(place)))


def is_kept(variable: str) -> bool:
    """Whether a new start takes this variable over from what runs."""
    return variable.startswith(KEPT) or variable in NETWORK


def refuse_to_begin_empty() -> None:
    """End with a sentence if this shell doesn't say where the runs, models or images of earlier starts are."""
    told = ELSEWHERE.read_text(encoding="utf-8").split() if ELSEWHERE.exists() else []
    missing = [variable for variable in PLACES if variable in told and is_own(variable)]
    if missing and os.environ.get("EMPTY") != "1":
        raise SystemExit(
            f"The servers here were last started with {' and '.join(missing)}, which this shell does not set: without, they would "
            f"begin anew on files in {HOME}. Set what is missing; or, if that is what you want, make up EMPTY=1."
        )
