"""The SQLite databases of the servers on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import mlflow_auth
from processes import HOME, STACK

from diffusion.settings import DATABASE, settings
from diffusion.tracking.database import is_current, make_current, make_mlflow_current
from flows.keyring import encryption_key
from flows.prefect_database import make_prefect_current

PREFECT, MLFLOW, MLFLOW_USERS = HOME / "prefect" / "prefect.db", HOME / DATABASE, STACK / "mlflow-auth.db"
OWN_DATABASES = {
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{PREFECT}",
    "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{MLFLOW}",
}


PLACES = OWN_DATABASES | {"TRAIN_DIFFUSION_STORE": str(HOME / "store")}
"""What is kept where these variables say, and here by default."""


def is_own(variable: str) -> bool:
    """Whether what this variable names is this installation's: a user's own may be shared, and its database has its own key."""
    return (os.environ.get(variable) or PLACES[variable]) == PLACES[variable]


def make_databases_current() -> None:
    """Have them be what the installed servers need; a user's own servers are brought up to date by whoever keeps them."""
    prefect: list[Callable[[], None]] = []
    mlflow: list[Callable[[], None]] = []
    if is_own("PREFECT_SERVER_DATABASE_CONNECTION_URL") and not is_current(PREFECT, "prefect"):
        encryption_key(STACK, PREFECT)  # out of the database, before that is copied
        prefect.append(partial(make_prefect_current, PREFECT))
    if is_own("MLFLOW_BACKEND_STORE_URI") and not is_current(MLFLOW, "mlflow"):
        mlflow.append(partial(make_mlflow_current, MLFLOW))
    if settings().auth == "on" and not is_current(MLFLOW_USERS, "mlflow"):
        mlflow.append(partial(make_current, MLFLOW_USERS, "mlflow", mlflow_auth.upgrade))
    if prefect or mlflow:
        print("making the databases, or bringing them to the versions that are installed …", flush=True)
    with ThreadPoolExecutor() as both:
        for done in [both.submit(_one_by_one, steps) for steps in (prefect, mlflow)]:
            done.result()


def _one_by_one(steps: list[Callable[[], None]]) -> None:
    for step in steps:
        step()
