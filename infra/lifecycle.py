"""What `make up` and `make down` do: start the servers and the worker, tell Prefect its deployments, and stop all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from databases import OWN_DATABASES, make_databases_current
from kept import SETTINGS, is_kept, keep_settings, note_places, refuse_to_begin_empty
from processes import (
    BIN,
    HOME,
    PROJECT,
    STACK,
    NotReady,
    base_environment,
    check_port,
    environment_of,
    family,
    find,
    start,
    stop,
    wait_until_ready,
)
from servers import CLUSTER, WITHHELD, Addresses, remove_ray_folder, start_mlflow, start_prefect, start_ray
from worker import WORKER

from diffusion.settings import settings
from diffusion.trust.private import use_private_home, write_private
from diffusion.trust.redaction import fit_to_leave
from flows.keyring import PASSWORD, known_password

SERVERS = STACK / "servers.json"  # read by the Prefect plugin
NAMES = ("worker", "ray", "mlflow-server", "prefect-server")
"""What there may be of it, in the order in which it is stopped."""


OPEN_TO_ALL = """
WARNING: the servers run without a password. Every user of this machine, and every program that runs on it, can read what they
hold, the secrets of Prefect's blocks among them, and have the worker run commands as you. Requests of other sites' web pages are
refused, but not those of pages that make their own name point to this machine, nor WebSockets. Use it where you are alone.
"""


def register_deployments(env: dict[str, str]) -> None:
    """The work pool and the automations, then the deployments of prefect.yaml. What runs goes on if that fails."""
    for command in (
        [sys.executable, "infra/automations.py"],
        [str(BIN / "prefect"), "--no-prompt", "deploy", "--all"],
    ):
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{fit_to_leave(done.stdout + done.stderr)}")
        if "infra/automations.py" in command:
            print(done.stdout, end="")


@contextmanager
def table_of_runs(env: dict[str, str]) -> Iterator[Callable[[], str]]:
    """Where MLflow's page of all runs is, below the server's address: a first look finds it there, before there are any.

    Asked for in a process of its own meanwhile, and waited for when it is called.
    """
    code = (
        "from diffusion.settings import settings; from diffusion.tracking.pages import runs_page; "
        "from diffusion.tracking.experiment import open_tracking; print(runs_page(open_tracking(settings())[1]))"
    )
    asked = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def answer() -> str:
        said = asked.communicate()[0].strip()
        return said if asked.returncode == 0 else ""  # a run says what is wrong, and what to do

    try:
        yield answer
    finally:
        asked.kill()
        asked.wait()


def up(register: bool = True) -> None:
    """Start all that is not running.

    Args:
        register: whether the server is told of work pool, automations and deployments; else it knows them already.
    """
    if (STACK / PASSWORD).exists():
        known_password(STACK)  # before anything is closed: one that others could read is none
    if closed := use_private_home(HOME):
        print(
            f"{', '.join(map(str, closed))}: open to others until now, and closed. If they could enter, they may know the secrets "
            "of Prefect's blocks and read what was trained: change those secrets."
        )
    STACK.mkdir(parents=True, exist_ok=True)
    refuse_to_begin_empty()
    (HOME / "prefect").mkdir(parents=True, exist_ok=True)
    prefect_port, mlflow_port, ray_port = settings().prefect_port, settings().mlflow_port, settings().ray_port
    own_cluster = settings().engine == "ray" and os.environ.get("RAY_ADDRESS") in (None, f"127.0.0.1:{ray_port}")
    password = None if settings().auth == "off" else known_password(STACK)
    addresses = Addresses(f"http://127.0.0.1:{prefect_port}", f"http://127.0.0.1:{mlflow_port}", password)
    if any(map(find, NAMES)):
        if register and runs_as_asked(addresses, own_cluster):
            print(
                "All of it runs already, as it is asked for: nothing is started anew. Renewing the deployments …",
                flush=True,
            )
            env = {**base_environment(), **addresses.client_environment()}
            with table_of_runs(env) as runs:
                register_deployments(env)
                tell_where(addresses, runs())
            return
        if register:
            refuse_under_a_run("make up", "what it runs on has to start anew")
        down()
    check_port(prefect_port, "Prefect", "PREFECT_PORT")
    check_port(mlflow_port, "MLflow", "MLFLOW_PORT")
    if own_cluster:
        check_port(ray_port, "Ray", "RAY_PORT")
    make_databases_current()
    print(f"starting the Prefect server and the MLflow server{', and Ray' if own_cluster else ''} …", flush=True)
    start_prefect(prefect_port, addresses)
    start_mlflow(mlflow_port, addresses)
    cluster = start_ray(ray_port) if own_cluster else {}
    try:
        wait_until_ready("prefect-server", addresses.prefect, "/api/health")
        wait_until_ready("mlflow-server", addresses.mlflow, "/health")
        if own_cluster:
            wait_until_ready("ray", f"tcp://{cluster['RAY_ADDRESS']}")
        # Again: one may have lost its port to another user's process since, while the others were waited for.
        wait_until_ready("prefect-server", addresses.prefect, "/api/health")
        wait_until_ready("mlflow-server", addresses.mlflow, "/health")
    except NotReady:
        down()
        raise
    # The worker and its flows need the store's keys and the servers' passwords, but nothing of how the servers are run.
    own = base_environment(*WITHHELD["worker"])
    env = {**own, **addresses.client_environment(), **cluster, "PREFECT_UI_URL": addresses.prefect_pages}
    with table_of_runs(env) as runs:
        if register:
            print("registering the deployments …", flush=True)
            try:
                register_deployments(env)
            except SystemExit:
                down()  # servers without a worker are of no use
                raise
        start("worker", WORKER, env)
        write_private(SERVERS, json.dumps(addresses.client_environment(), indent=1))
        note_places()
        if register and SETTINGS.exists():  # else the settings are those that it ran with
            keep_settings()
        profile("follow")
        tell_where(addresses, runs())


def runs_as_asked(addresses: Addresses, own_cluster: bool) -> bool:
    """Whether all that `up` would start runs with the settings of this shell."""
    processes = {name: find(name) for name in NAMES}
    if not all(processes[name] for name in NAMES if name != "ray") or bool(processes["ray"]) != own_cluster:
        return False
    if not SERVERS.exists() or json.loads(SERVERS.read_text(encoding="utf-8")) != addresses.client_environment():
        return False
    asked = OWN_DATABASES | base_environment()
    for name, process in processes.items():
        begun = environment_of(process) if process is not None else asked
        if any(begun.get(one) != asked.get(one) for one in {*begun, *asked} if _must_agree(name, one, own_cluster)):
            return False
    return True


def _must_agree(process: str, variable: str, own_cluster: bool) -> bool:
    """Whether a process that has another value of this variable than the shell has to start anew."""
    if variable == "TRAIN_DIFFUSION_NOTIFY":  # of the automations alone
        return False
    if own_cluster and variable.startswith(
        CLUSTER
    ):  # the worker has the address and the token of what was started here
        return False
    return is_kept(variable) and not variable.startswith(WITHHELD[process])


def refuse_under_a_run(command: str, why: str) -> None:
    """End with a sentence if a flow run is under way, which the command would end."""
    worker = find("worker")
    if worker is not None and len(family(worker)) > 1 and os.environ.get("FORCE") != "1":
        raise SystemExit(f"A flow run is under way, and would end: {why}. Wait for it, or {command} FORCE=1.")


def tell_where(addresses: Addresses, runs: str) -> None:
    """Say where everything is."""
    print(f"\nPrefect  {addresses.prefect_pages}\nMLflow   {addresses.mlflow_pages}/{runs}")
    if password := addresses.password:
        # Not into a file or a pipe, where it would stay.
        shown = password if sys.stdout.isatty() else "PASSWORD"
        print(f"both ask for user admin and the password in {STACK / PASSWORD}; Prefect wants admin:{shown}")
    else:
        print(OPEN_TO_ALL)
    print(
        "\nsource .venv/bin/activate\nprefect deployment run train-diffusion -p preset=demo --watch\n\nmake down stops it all."
    )


def down() -> None:
    """Stop what `up` started."""
    for name in NAMES:
        stop(name)
    remove_ray_folder()
    profile("withdraw")  # which looks whose address it has
    SERVERS.unlink(missing_ok=True)


def profile(verb: str) -> None:
    """Have the user's Prefect profile, if there is one, follow what the servers do."""
    done = subprocess.run(
        [sys.executable, str(PROJECT / "infra" / "prefect_profile.py"), verb], capture_output=True, text=True
    )
    if done.returncode != 0:
        print(f"The Prefect profile was left as it was: {done.stderr.strip().splitlines()[-1:]}")
