"""The servers on this machine, without containers: `python infra/stack.py up | down | status | password | env | clean`.

up starts a Prefect server, an MLflow server and a worker on the loopback interface, with credentials of their own
(AUTH=off: without), and registers the deployments of prefect.yaml. With TRAIN_DIFFUSION_ENGINE=ray, and no RAY_ADDRESS, it starts
Ray as well, a head that computes on this machine. down stops these processes and no others. password makes a new password and
has everything here follow it. env prints what a shell needs to know to use all of it: eval "$(make env)". clean deletes what can be
made again.

Ports: PREFECT_PORT (4200), MLFLOW_PORT (5000), RAY_PORT (6379). Databases: SQLite under var/, or what
PREFECT_SERVER_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI say: then each later start must be told as well.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from urllib.parse import urlsplit

from databases import OWN_DATABASES
from kept import is_kept, refuse_to_begin_empty
from lifecycle import NAMES, OPEN_TO_ALL, SERVERS, down, refuse_under_a_run, up
from processes import BIN, HOME, STACK, alone, environment_of, find
from servers import follow_password

from diffusion.errors import UserError
from diffusion.settings import reach_loopback_directly, settings
from diffusion.trust.private import read_private, use_private_home
from flows.keyring import PASSWORD, TOKEN, new_password


def password() -> None:
    """Change the password of the servers; those that run are started anew with it. The old one is refused from then on."""
    use_private_home(HOME)
    STACK.mkdir(parents=True, exist_ok=True)
    refuse_under_a_run("make password", "it has the old password")
    if SERVERS.exists():  # on the same ports
        running = json.loads(SERVERS.read_text(encoding="utf-8"))
        for variable, address in (("PREFECT_PORT", "PREFECT_API_URL"), ("MLFLOW_PORT", "MLFLOW_TRACKING_URI")):
            os.environ.setdefault(variable, str(urlsplit(running[address]).port))
    for process in filter(None, map(find, NAMES)):  # and with the same settings
        for variable, value in environment_of(process).items():
            if is_kept(variable):
                os.environ.setdefault(variable, value)
    refuse_to_begin_empty()  # before anything is changed
    made = new_password(STACK)
    if any(map(find, NAMES)):
        up(register=False)
    else:
        follow_password(made)
    print(f"The new password is in {STACK / PASSWORD}. Browsers ask for it anew; the old one is refused.")


def clean() -> None:
    """Delete what can be made again, and say what stays."""
    refuse_under_a_run("make clean", "it reads the copies that are deleted")
    freed = 0
    for folder in (settings().shard_copies, settings().downloads / "tars", HOME / "matplotlib", HOME / "compiled"):
        freed += sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder, ignore_errors=True)
    for path in settings().downloads.glob("*.part"):
        freed += path.stat().st_size
        path.unlink()
    print(f"{freed / 1e6:.0f} MB freed: copies of shards and tars, compiled code, downloads that were not finished.")
    print(
        f"All else in {HOME} stays: datasets, checkpoints, models, metrics, logs. The deployment clean-up goes further."
    )


def env() -> None:
    """Print lines for a shell: the programs of .venv, and where MLflow and Prefect are. Without servers, MLflow's database here."""
    from flows.plugins.deployment import KEYS  # which imports Prefect, and that takes a second

    here = {"MLFLOW_TRACKING_URI": OWN_DATABASES["MLFLOW_BACKEND_STORE_URI"]}
    known = json.loads(read_private(SERVERS)) if SERVERS.exists() else here
    known = {name: value for name, value in known.items() if name in KEYS}
    for name, value in known.items():
        print(f"export {name}={shlex.quote(value)}")
    reach_loopback_directly()  # and so does what that shell starts, also where it has a proxy for the world outside
    for name in ("NO_PROXY", "no_proxy"):
        print(f"export {name}={shlex.quote(os.environ.get(name, '*'))}")
    print(f'export PATH={shlex.quote(str(BIN))}:"$PATH"')


def status() -> None:
    """Say what is running."""
    for name in reversed(NAMES):
        process = find(name)
        if process is None and name == "ray" and not (STACK / TOKEN).exists():
            continue
        print(f"{name:15} {f'running, pid {process.pid}' if process else 'not running'}")
    if SERVERS.exists() and "PREFECT_API_AUTH_STRING" not in json.loads(SERVERS.read_text(encoding="utf-8")):
        print(OPEN_TO_ALL)


def obey(commands: dict[str, Callable[[], None]], usage: str | None) -> None:
    """Run the command that the command line names; end with a sentence if that is a user's to mend."""
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        raise SystemExit(usage)
    try:
        with alone() if sys.argv[1] in ("up", "down", "password") else nullcontext():
            commands[sys.argv[1]]()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    obey({"up": up, "down": down, "status": status, "password": password, "env": env, "clean": clean}, __doc__)
