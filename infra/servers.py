"""The servers of the stack as processes: where they listen, what each is told, what is kept from it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow_auth
from databases import MLFLOW_USERS, OWN_DATABASES, PREFECT, is_own
from processes import BIN, HOME, STACK, base_environment, start

from diffusion.settings import settings
from diffusion.trust.private import read_private, write_private
from flows.keyring import cluster_token, encryption_key

RAY_FOLDER = "ray-folder"
STORE_KEYS, CLUSTER, PREFECT_OWN, MLFLOW_OWN = "AWS_", "RAY_", "PREFECT_", "MLFLOW_"
WITHHELD: dict[str, tuple[str, ...]] = {
    "prefect-server": (STORE_KEYS, CLUSTER, MLFLOW_OWN),
    "mlflow-server": (STORE_KEYS, CLUSTER, PREFECT_OWN),
    "worker": ("PREFECT_SERVER_", "MLFLOW_BACKEND_", "MLFLOW_AUTH_"),
    "ray": (STORE_KEYS, CLUSTER, PREFECT_OWN, MLFLOW_OWN),
}
"""Beginnings of the names of variables that a process has no need of, and does not get."""


@dataclass(frozen=True)
class Addresses:
    """Where the servers listen, and with what credentials."""

    prefect: str
    mlflow: str
    password: str | None
    """Of the user `admin` on both; None: no credentials."""

    @property
    def prefect_pages(self) -> str:
        """Where people open Prefect."""
        return settings().flow_pages.rstrip("/") or self.prefect

    @property
    def mlflow_pages(self) -> str:
        """Where people open MLflow."""
        return settings().tracking_pages.rstrip("/") or self.mlflow

    def client_environment(self) -> dict[str, str]:
        """What a client needs to know."""
        env = {"PREFECT_API_URL": f"{self.prefect}/api", "MLFLOW_TRACKING_URI": self.mlflow}
        if self.password:
            env["PREFECT_API_AUTH_STRING"] = f"admin:{self.password}"
            env |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.password}
        return env


def origin(address: str) -> str:
    """Of a page, as browsers tell it."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.netloc}"


def start_prefect(port: int, addresses: Addresses) -> None:
    """The Prefect server."""
    pages = addresses.prefect_pages
    env = {
        **base_environment(*WITHHELD["prefect-server"]),
        # The pages of its own, and no others.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(dict.fromkeys((addresses.prefect, origin(pages)))),
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_UI_API_URL": f"{pages}/api",
        "PREFECT_UI_URL": pages,  # for the links in notifications
        # Concurrency leases in files outlive a restart of the server; in its memory, the run would be ended by one.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    database = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
    if is_own(database):
        env[database] = OWN_DATABASES[database]
        env["PREFECT_SERVER_ENCRYPTION_KEY"] = encryption_key(STACK, PREFECT)
    if addresses.password:
        env["PREFECT_SERVER_API_AUTH_STRING"] = f"admin:{addresses.password}"
    else:  # else pages of other sites could have it do what they like, though not read what it answers
        env["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] = "true"
    start("prefect-server", [str(BIN / "prefect"), "server", "start"], env)


def start_mlflow(port: int, addresses: Addresses) -> None:
    """The MLflow server. Like Prefect's, it shares its database with `make demo`, so that the demo's runs are seen here."""
    (HOME / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
    # The job runner and its seven consumers, which only GenAI evaluations need, would take 2 GB.
    env = {**base_environment(*WITHHELD["mlflow-server"]), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # In the environment: an argument, which may hold a password, is seen by every user of the machine.
    variable = "MLFLOW_BACKEND_STORE_URI"
    env[variable] = env.get(variable) or OWN_DATABASES[variable]
    pages = [addresses.mlflow, f"http://localhost:{port}", *filter(None, [settings().tracking_pages])]
    env["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(urlsplit(page).netloc for page in pages)
    env["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(map(origin, pages))
    artifacts = (HOME / "mlflow" / "artifacts").as_uri()
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--default-artifact-root", artifacts, "--no-serve-artifacts"]
    if addresses.password:
        config = STACK / "mlflow-auth.ini"
        mlflow_auth.write_settings(config, f"sqlite:///{MLFLOW_USERS}")
        follow_password(addresses.password)
        command += ["--app-name", "basic-auth"]
        env |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_PASSWORD": addresses.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        }
    start("mlflow-server", command, env)


def start_ray(port: int) -> dict[str, str]:
    """Ray on this machine, for this user alone; returns what a client of it needs to know."""
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("TRAIN_DIFFUSION_ENGINE is ray, which is not installed: make ray")
    own = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": cluster_token(STACK),
        "RAY_worker_niceness": "0",  # as ranks without Ray have it: by default, they give way to all else
        # For other systems than Linux it would say so by itself: no cluster with other machines. Else it takes the machine's
        # address for 127.0.0.1, and listens everywhere.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    # It opens its own folder, where its sockets are, to everybody; and their paths may not be long. So: within a private one.
    remove_ray_folder()
    folder = tempfile.mkdtemp(prefix="ray-")
    write_private(STACK / RAY_FOLDER, folder)
    command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false", "--disable-usage-stats"]
    command += [f"--temp-dir={folder}/s"]
    start("ray", command, {**base_environment(*WITHHELD["ray"]), **own})
    return {**own, "RAY_ADDRESS": f"127.0.0.1:{port}"}


def remove_ray_folder() -> None:
    """What Ray has left: its logs and sockets."""
    with contextlib.suppress(OSError):  # gone, or after a restart of the machine somebody else's under that name
        folder = Path(read_private(STACK / RAY_FOLDER))
        if folder.lstat().st_uid == os.getuid():
            shutil.rmtree(folder)
    (STACK / RAY_FOLDER).unlink(missing_ok=True)


def follow_password(password: str) -> None:
    """Have MLflow's users, where they are there already, know the password."""
    if MLFLOW_USERS.exists():
        mlflow_auth.follow_password(f"sqlite:///{MLFLOW_USERS}", password)
