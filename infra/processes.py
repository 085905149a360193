"""The processes of the stack on this machine: where they live, how they are started, found again, waited for and stopped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from diffusion.errors import SettingsError
from diffusion.jobs.started import is_same, started
from diffusion.settings import reach_loopback_directly, settings
from diffusion.trust.private import write_private

PROJECT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TRAIN_DIFFUSION_HOME", str(PROJECT / "var"))  # from whatever folder it is called
# What is imported or started here tells nobody that it was.
os.environ |= {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
reach_loopback_directly()
try:
    HOME = settings().home
except SettingsError as error:
    raise SystemExit(f"error: {error}") from None
STACK = HOME / "stack"
BIN = Path(sys.executable).parent
READY_SECONDS = 300
STOP_SECONDS = 30
LONGEST_LOG = 20_000_000
"""Bytes; a longer one makes room for a new one at the next start, and stays until there is another."""


class NotReady(SystemExit):
    """A server does not answer: the sentence to end with."""


def base_environment(*withheld: str) -> dict[str, str]:
    """For every process of the stack. Databases and homes lie in this project, never in the user's home folder.

    Args:
        withheld: beginnings of the names of variables that this process has no need of.
    """
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(withheld)},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "TRAIN_DIFFUSION_HOME": str(HOME),
        "TRAIN_DIFFUSION_PROJECT": str(PROJECT),
        "PREFECT_HOME": str(HOME / "prefect"),
        "PREFECT_PLUGINS_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MPLCONFIGDIR": str(HOME / "matplotlib"),
    }


@contextlib.contextmanager
def alone(wait: bool = True) -> Iterator[bool]:
    """While nothing else starts or stops the stack: two that do would each see half of it. Yields whether it is so.

    Args:
        wait: until another one is done, which is said.
    """
    if not STACK.exists():  # the first start of all makes it, private
        yield True
        return
    with (STACK / "changing.lock").open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield False
                return
            lock.seek(0)
            who = lock.read(20).decode(errors="replace")
            print(
                f"another command starts or stops the servers: waiting for its end … (if it hangs: kill {who})",
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield True


def start(name: str, command: list[str], env: dict[str, str]) -> None:
    """Start one process of the stack and remember it by pid and start: a pid alone may be somebody else's one day."""
    said = STACK / f"{name}.log"
    if said.exists() and said.stat().st_size > LONGEST_LOG:
        said.replace(STACK / f"{name}.log.1")
    with said.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        # Whole at every moment: others look at it, and what is killed here leaves no half of one.
        write_private(STACK / f"{name}.pid", f"{process.pid} {started(process.pid)}")
    except OSError as error:  # a full disk: what nobody can find again must not stay
        process.kill()
        process.wait()
        raise SystemExit(f"error: {STACK} can't be written ({error.strerror}): {name} was not started.") from None


def runs(process: psutil.Process) -> bool:
    """A zombie has ended: who reaps it, and when, is not ours to say. In a container often nobody does."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def find(name: str) -> psutil.Process | None:
    """The running process of that name, or None."""
    path = STACK / f"{name}.pid"
    if not path.exists():
        return None
    pid, noted = path.read_text(encoding="utf-8").split()
    try:
        process = psutil.Process(int(pid))
        return process if runs(process) and is_same(process.pid, float(noted)) else None
    except psutil.NoSuchProcess:
        return None


def family(process: psutil.Process) -> list[psutil.Process]:
    """It and all that it has started; nothing if it has ended."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def environment_of(process: psutil.Process) -> dict[str, str]:
    """What it was started with; nothing if it has ended."""
    try:
        return process.environ()
    except psutil.NoSuchProcess:
        return {}


def stop(name: str) -> None:
    """Stop one process of the stack and all that it started."""
    process = find(name)
    if process is not None:
        left = family(process)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while (left := [one for one in left if runs(one)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        print(f"stopped {name}")
    (STACK / f"{name}.pid").unlink(missing_ok=True)


def listens(name: str, port: int) -> bool:
    """Whether it is the process of that name, or one that it has started, to whom connections to the port come."""
    process = find(name)
    for one in family(process) if process is not None else []:
        with contextlib.suppress(psutil.Error):  # it ends just now
            if any(there.status == psutil.CONN_LISTEN and there.laddr.port == port for there in one.net_connections()):
                return True
    return False


def wait_until_ready(name: str, address: str, path: str = "") -> None:
    """Wait until the server answers, and no other in its place: the password goes there next.

    Raises NotReady with the last lines of its log if it dies or takes too long.

    Args:
        path: what it is asked for, if it speaks HTTP.
    """
    deadline, (host, _, port) = time.monotonic() + READY_SECONDS, urlsplit(address).netloc.partition(":")
    while time.monotonic() < deadline and find(name) is not None:
        try:
            if path:
                urllib.request.urlopen(f"{address}{path}", timeout=2).close()  # noqa: S310  our own loopback address
            else:
                socket.create_connection((host, int(port)), timeout=2).close()
            if listens(name, int(port)):
                return
            time.sleep(0.3)
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    log = (STACK / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    raise NotReady(f"{name} did not become ready at {address}. The end of {STACK / f'{name}.log'}:\n" + "\n".join(log))


def check_port(port: int, name: str, variable: str) -> None:
    """End with a sentence if the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise SystemExit(
                f"Port {port}, for {name}, is taken. Choose another: make up {variable}={port + 100}"
            ) from None
