"""A rank on a cluster: what runs in each worker, an actor of Ray, and the mailbox between these and the driver."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray

from diffusion.errors import DataError
from diffusion.jobs.rank import (
    DEVICE,
    LINK_SECONDS,
    Rank,
    keep_compiled,
    make_accelerator,
    on_gpu,
    use_deterministic_algorithms,
)
from diffusion.jobs.reports import ProgressFile, RankOutput, report_of
from diffusion.store.objects import open_store
from diffusion.tracking.system import SAMPLE_SECONDS, Machine
from diffusion.training.journal import TIMING, commit, committed_step
from diffusion.trust.redaction import redact_logs

FOLDERS = f"train-diffusion-{socket.gethostname()}-"
"""Beginning of the names of ranks' folders on this host, before the process."""
POLL_SECONDS = 0.3
FIRST_LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""That a worker waits for the driver's answer before it takes it for lost."""


class Mailbox:
    """What workers say and are told; a Ray actor beside the driver, which dies with it."""

    def __init__(self) -> None:
        self._environment: dict[str, str] = {}
        self._errors: list[dict[str, Any]] = []
        self._newest: dict[int, dict[str, Any]] = {}
        self._stop = False

    def prepare(self, environment: dict[str, str]) -> None:
        """What workers need to reach the store. It is asked for, never part of a spec: Ray shows those to whoever looks."""
        self._environment = environment

    def environment(self) -> dict[str, str]:
        """What `prepare` was given."""
        return self._environment

    def ask_to_stop(self) -> None:
        """From now on workers that listen leave a checkpoint and end."""
        self._stop = True

    def tell(self, message: dict[str, Any]) -> bool:
        """Take a worker's message; returns whether it is asked to stop."""
        if "error" in message:
            self._errors.append(message)
        elif len(message) > 1:  # beside its rank
            self._newest.setdefault(message["rank"], {}).update(message)
        return self._stop

    def take(self) -> list[dict[str, Any]]:
        """What was told since the last call: of each rank the newest, and every error."""
        told = [*self._newest.values(), *self._errors]
        self._newest, self._errors = {}, []
        return told


class Worker:
    """One rank: a process that Ray starts for it on one of the hosts."""

    def __init__(self) -> None:
        """Where this fails, the host can't run a rank. Driver and mailbox, which share this module, have no use for torch."""
        import accelerate  # noqa: F401

    def meet(self) -> tuple[str, int]:
        """Where the ranks may meet, if this is the first of them: on the cluster's network, and on no other."""
        self._door = socket.create_server((ray.util.get_node_ip_address(), 0))
        return self._door.getsockname()

    def run(self, told: dict[str, Any], rank: int, ranks: int, meeting: tuple[str, int]) -> None:
        """A rank's main. `told`: the job's module and spec, the mailbox, a marker in the store, the step that is committed, and the
        ranks that say what their hosts do."""
        import torch

        mailbox = told["mailbox"]
        host = f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"
        redact_logs()
        os.umask(0o077)
        try:
            _look_for_gpus()
            os.environ.update(ray.get(mailbox.environment.remote(), timeout=PATIENCE_SECONDS))
            spec_type, body = importlib.import_module(told["module"]).JOB
            spec = spec_type.model_validate_json(told["spec"]).model_copy(update={"shard_copies": _cache() / "shards"})
            keep_compiled(spec.compiled / socket.gethostname())  # several hosts may share it
            _find_marker(spec.store, told["marker"], host)
            _sweep()
            with (
                tempfile.TemporaryDirectory(prefix=f"{FOLDERS}{os.getpid()}-") as name,
                _logging_as(rank),
                _messenger(mailbox, rank, Path(name)) as listen,
                _watching(mailbox, rank, rank in told["watchers"]),
            ):
                if rank == 0:
                    commit(Path(name), told["committed"])
                _join(rank, ranks, meeting, self._door)
                if spec.deterministic:
                    use_deterministic_algorithms()
                accelerator = make_accelerator()
                print(f"on {host}, {accelerator.device}, {torch.get_num_threads()} threads", flush=True)
                body(spec, Rank(accelerator, Path(name), listen))
        except Exception as error:
            # As a message: Ray would hand the exception on as a pickle.
            report = report_of(error, rank) | {"host": host}
            ray.get(mailbox.tell.remote({"error": report}), timeout=PATIENCE_SECONDS)
            raise


def _look_for_gpus() -> None:
    """Have a rank use the GPU that Ray has given it. Raises RuntimeError if it can't be used.

    One that was given none sees none: Ray may show it those of the host, which others use.
    """
    if ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ[DEVICE] = "cuda"
    else:
        os.environ |= {DEVICE: "cpu", "CUDA_VISIBLE_DEVICES": ""}
    on_gpu()


def _join(rank: int, ranks: int, meeting: tuple[str, int], door: socket.socket) -> None:
    """Meet the other ranks, if there are any. Each sees one GPU at most."""
    import torch.distributed as dist

    if rank > 0 or ranks == 1:
        door.close()
    if ranks == 1:  # no group: what the host's own environment says of one is not meant
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        return
    address, port = meeting
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}  # Accelerate asks for them
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # Else gloo takes the address of the host's name, which often is one of loopback.
    here = ray.util.get_node_ip_address()
    own = [name for name, found in psutil.net_if_addrs().items() if any(one.address == here for one in found)]
    if own:
        os.environ |= {"GLOO_SOCKET_IFNAME": own[0], "NCCL_SOCKET_IFNAME": own[0]}
    backend = "nccl" if on_gpu() else "gloo"
    waits = timedelta(seconds=LINK_SECONDS)
    # By itself the first rank would open a port of its own, on all of the host's networks.
    first: dict[str, Any] = {"is_master": True, "master_listen_fd": door.detach()} if rank == 0 else {}
    store = dist.TCPStore(address, port, ranks, timeout=waits, use_libuv=False, **first)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=waits)


def _find_marker(uri: str, marker: str, host: str) -> None:
    """Raises DataError if this host sees another store than the driver."""
    try:
        open_store(uri).read(marker)
    except KeyError:
        raise DataError(
            f"The host {host} does not see what the flow's machine writes to the store {uri}. On several hosts the store must "
            "be S3, or a folder that all of them mount: set TRAIN_DIFFUSION_STORE."
        ) from None


@contextmanager
def _logging_as(rank: int) -> Iterator[None]:
    """What the body prints and logs goes out with its rank, and fit to leave."""
    output = RankOutput(f"[rank {rank}] ", sys.stdout)
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(output):
            yield
    finally:
        root.removeHandler(handler)


def _sweep() -> None:
    """Remove the folders of ranks of this host that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*-*"):
        pid = path.name.removeprefix(FOLDERS).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)) and path.lstat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)


def _cache() -> Path:
    """Where this host keeps copies of shards, whose digests are checked whenever they are read."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "train-diffusion"


@contextmanager
def _watching(mailbox: Any, rank: int, active: bool) -> Iterator[None]:
    """A thread that says what this host does, while the body runs, and once more at its end: a job may last seconds."""
    ended = threading.Event()

    def watch() -> None:
        machine, wait = Machine(), FIRST_LOOK_SECONDS
        while True:
            last = ended.wait(wait)
            wait = SAMPLE_SECONDS
            try:
                seen = {socket.gethostname(): dict(machine.look())}
                ray.get(mailbox.tell.remote({"rank": rank, "machine": seen}), timeout=PATIENCE_SECONDS)
            except Exception as error:  # no reason to end: a driver's trouble, or the network's
                print(f"no metrics of this host for a moment ({type(error).__name__})", flush=True)
            if last:
                return

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    if active:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if active:
            thread.join(PATIENCE_SECONDS)


@contextmanager
def _messenger(mailbox: Any, rank: int, folder: Path) -> Iterator[Callable[[], Callable[[], bool]]]:
    """A thread that carries what the body writes to its folder to the driver, and the driver's request to stop back."""
    ended, asked, listening = threading.Event(), threading.Event(), threading.Event()

    def listen() -> Callable[[], bool]:
        listening.set()
        return asked.is_set

    def news() -> dict[str, Any]:
        found: dict[str, Any] = {"listens": listening.is_set()}
        with contextlib.suppress(FileNotFoundError):
            found["progress"] = json.loads((folder / ProgressFile.NAME).read_text(encoding="utf-8"))
        if rank == 0:
            found["committed"] = committed_step(folder)
        return found

    def carry() -> None:
        sent: dict[str, Any] = {}
        while True:
            last = ended.is_set()
            message = {key: value for key, value in news().items() if sent.get(key) != value}
            timing = {}
            if "committed" in message and (folder / TIMING).exists():
                timing["timing"] = (folder / TIMING).read_text(encoding="utf-8")
            try:
                if ray.get(mailbox.tell.remote({"rank": rank, **message, **timing}), timeout=PATIENCE_SECONDS):
                    asked.set()
                sent |= message
            except Exception as error:  # the driver is gone, and Ray ends this process; or the network is, for a while
                print(f"no word from the driver ({type(error).__name__})", flush=True)
            if last:
                return
            ended.wait(POLL_SECONDS)

    thread = threading.Thread(target=carry, name="messenger", daemon=True)
    thread.start()
    try:
        yield listen
    finally:
        ended.set()
        thread.join(PATIENCE_SECONDS)
