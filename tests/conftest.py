"""What tests share: small datasets, real servers, and a home of their own for everything that is written."""

from __future__ import annotations

import os

# Before anything imports numpy or torch: two threads on two busy cores make small sums ten times slower than one.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import hypothesis
import numpy as np
import pytest

from diffusion.data.ingest import ingest
from diffusion.data.manifest import Manifest
from diffusion.data.sources import generated
from diffusion.data.sources.eurosat import read_archive
from diffusion.data.sources.source import Source
from diffusion.recipe import Recipe
from diffusion.recipe_files import load_recipe
from diffusion.store.objects import FolderStore
from diffusion.tracking import connection
from tests.faults.report import SEED, Kill, table
from tests.postgres import programs, running_postgres

BIN = Path(sys.executable).parent
UMASK = 0o022
"""What most machines have. Flows and jobs that run in the tests' own process change it for the rest of that process."""
os.umask(UMASK)
PATIENCE = 900.0
"""Seconds: what takes ten of them on a quiet machine takes minutes where others keep it busy."""
ANSWERS = "/api/2.0/mlflow/experiments/search?max_results=1"
"""What an MLflow server answers once it has looked at its database, which is after it says that it is well."""
connection.ANSWER_SECONDS = 60

# No test is about time: a busy machine must not fail one.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

TINY: dict[str, Any] = {
    "data.image_size": 16,
    "data.images": 256,
    "data.batch_size": 16,
    "data.lanes": 2,
    "data.window_shards": 2,
    "network.width": 16,
    "network.patch": 1,
    "network.attention_below": 8,
    "optimizer.warmup_images": 32,
    "ema.half_lives": [500_000],
    "evaluation.every_images": 128,
    "evaluation.guidance": 1.0,
    "evaluation.samples": 80,
    "evaluation.likelihood_images": 16,
    "evaluation.sampler_steps": 3,
    "evaluation.batch": 40,
}


def tiny_recipe(**overrides: Any) -> Recipe:
    """A recipe that trains in seconds; overrides with `__` for the dot."""
    return load_recipe("demo", TINY | {key.replace("__", "."): value for key, value in overrides.items()})


SHARED = {
    "hosts": ("test_hosts.py", "test_slurm.py"),
    "stack of its own": ("test_nights.py", "test_flow_faults.py", "test_slots.py", "test_passwords.py"),
    "stack": (
        "test_pages.py",
        "test_stack.py",
        "test_doors.py",
        "test_changed_models.py",
        "test_running.py",
    ),
    "kills": ("test_kills.py",),
    "mlflow_server": ("test_tracking.py", "test_mlflow_faults.py"),
    "prefect_server": ("test_flow.py", "test_retention.py", "test_names.py", "test_s3_block.py"),
    "s3": ("test_s3_store.py", "test_s3_faults.py"),
}
"""Fixtures that take long to start, and the files whose tests share them, in this order."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers (pytest -n 2), files that share a server go to one of them, the slowest first."""
    from xdist.scheduler import LoadScopeScheduling

    groups = {name: server for server, names in SHARED.items() for name in names}

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return groups.get(path.rsplit("/", 1)[-1], path)

    config.option.loadscopereorder = False
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares the slowest servers first, units last, and within that what changes or ends a server last."""
    files = {name: (rank, order) for rank, names in enumerate(SHARED.values()) for order, name in enumerate(names)}

    def place(item: pytest.Item) -> tuple[int, int, int]:
        rank, order = files.get(item.path.name, (len(SHARED) + ("unit" in item.path.parts), 0))
        last = item.get_closest_marker("last")
        return rank, last.args[0] if last else 0, order

    items.sort(key=place)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the kills of all tests, on whichever worker they ran, in one table, and write each to the file that SOAK_REPORT names."""
    told = [
        value
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if name == "kills" and report.when == "call"
    ]
    kills = [Kill(**kill) for text in told for kill in json.loads(str(text))]
    if kills:
        terminalreporter.write_line(f"\nseed {SEED}, {len(kills)} kills\n{table(kills)}")
        if path := os.environ.get("SOAK_REPORT"):
            Path(path).write_text(
                json.dumps({"seed": SEED, "kills": [asdict(kill) for kill in kills]}, indent=1) + "\n"
            )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What runs beside the longest chains, those on hosts and of the stack, gives way: they would end long after all else."""
    longest = (*SHARED["hosts"], *SHARED["stack"])
    if "PYTEST_XDIST_WORKER" in os.environ and item.path.name not in longest and os.nice(0) == 0:
        os.nice(5)


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    yield
    os.umask(UMASK)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated archive with 12 images a class."""
    return generated.write_archive(tmp_path_factory.mktemp("archive") / "generated.zip", images_per_class=12)


@pytest.fixture(scope="session")
def source(archive: Path) -> Source:
    """Its images."""
    return read_archive(archive, generated.NAME, generated.LICENCE)


def lay_out(home: Path, archive: Path) -> None:
    """Put the archive where an installation looks for its generated one, which has seventeen times as many images."""
    (home / "downloads").mkdir(parents=True, exist_ok=True)
    shutil.copy(archive, home / "downloads" / f"{generated.NAME}-{generated.VERSION}.zip")


@dataclass(frozen=True)
class Ingested:
    """A dataset in a folder store."""

    store: FolderStore
    manifest: Manifest


@pytest.fixture(scope="session")
def ingested(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Ingested:
    """The generated images as shards, several of them."""
    store = FolderStore(tmp_path_factory.mktemp("store"))
    return Ingested(store, ingest(source, store, shard_bytes=60_000))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the installation, for settings() in this process and in those that it starts."""
    for name in ("EUROSAT_ARCHIVE", "TRAIN_DIFFUSION_STORE", "MLFLOW_TRACKING_URI", "TRAIN_DIFFUSION_INCEPTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRAIN_DIFFUSION_HOME", str(tmp_path / "var"))
    return tmp_path / "var"


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as its first use makes it, which takes six seconds."""
    from diffusion.tracking.connection import connect

    path = tmp_path_factory.mktemp("mlflow-empty") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def home_with_mlflow(home: Path, empty_mlflow: Path) -> Path:
    """A home in which MLflow has been used before."""
    (home / "mlflow").mkdir(parents=True)
    shutil.copy(empty_mlflow, home / "mlflow" / "mlflow.db")
    return home


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on now, low enough that port + 10000 is one as well: the S3 server uses both.

    Up to four workers have ports of their own, and none is given twice: it may be bound seconds later, and again after a while.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    while True:
        port = 10_000 + 2_500 * worker + secrets.randbelow(2_500)  # both below those that outgoing connections take
        try:
            with socket.socket() as probe, socket.socket() as second:
                probe.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
        except OSError:
            continue
        if port not in _given:
            _given.add(port)
            return port


@dataclass
class Server:
    """A server process that a test started."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path


def start_server(
    command: list[str], url: str, ready: str, folder: Path, env: dict[str, str] | None = None, seconds: float = PATIENCE
) -> Server:
    """Start a server and wait until `ready` answers with anything."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **(env or {})}, stdout=output, stderr=output)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(ready, timeout=2):
                return Server(url, process, log)
        except urllib.error.HTTPError:
            return Server(url, process, log)
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-3000:]}")


def stop_server(server: Server) -> None:
    """End a server."""
    server.process.terminate()
    try:
        server.process.wait(15)
    except subprocess.TimeoutExpired:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server; on PostgreSQL, where there is one, as people's own servers are."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with running_postgres(free_port()) if programs() else nullcontext(f"sqlite:///{folder / 'mlflow.db'}") as database:
        env["MLFLOW_BACKEND_STORE_URI"] = database
        server = start_server(command, url, f"{url}{ANSWERS}", folder, env)
        yield server
        stop_server(server)


@dataclass
class S3Server:
    """A real S3 server with one user, which may be killed and started again."""

    folder: Path
    command: list[str]
    env: dict[str, str]
    """What a client needs."""
    server: Server

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def restart(self) -> None:
        self.server = start_server(self.command, self.server.url, f"{self.server.url}/", self.folder)


def start_s3(folder: Path, address: str = "127.0.0.1") -> S3Server:
    """Start it with an empty bucket `tests`."""
    import boto3

    port, filer, volume, master = (free_port() for _ in range(4))
    key, secret = "tests", secrets.token_hex(8)
    allowed = ["Read:tests", "Write:tests", "List:tests"]
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
        for name, actions in (("admin", ["Admin"]), (key, allowed))
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    command = [str(BIN / "weed"), "server", f"-dir={folder}", f"-ip={address}", f"-ip.bind={address}", "-s3"]
    command += [f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", f"-filer.port={filer}"]
    command += [f"-volume.port={volume}", f"-master.port={master}", "-volume.max=20", "-master.volumeSizeLimitMB=256"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else fixed ports, and a second server would not start
    server = start_server(command, f"http://{address}:{port}", f"http://{address}:{port}/", folder)
    client = boto3.client(
        "s3", endpoint_url=server.url, aws_access_key_id="admin", aws_secret_access_key=secret, region_name="us-east-1"
    )
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            client.create_bucket(Bucket="tests")
            break
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            break  # by a try whose answer was lost
        except Exception as error:  # the gateway answers before the volumes behind it do
            if time.monotonic() > deadline or server.process.poll() is not None:
                raise RuntimeError(f"no bucket can be made:\n{server.log.read_text()[-2000:]}") from error
            time.sleep(0.2)
    env = {
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return S3Server(folder, command, env, server)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server; gives the environment that a client needs."""
    server = start_s3(tmp_path_factory.mktemp("s3"))
    yield server.env
    server.kill()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefect's own test harness: a temporary server for the flows of this process."""
    home = tmp_path_factory.mktemp("prefect")
    os.environ["PREFECT_HOME"], os.environ["PREFECT_LOCAL_STORAGE_PATH"] = str(home), str(home / "storage")
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    from prefect.testing.utilities import prefect_test_harness

    from flows.prefect_database import make_prefect_current

    made = home / "database"
    make_prefect_current(made / "prefect-test.db")  # where the harness looks for it
    with ExitStack() as harness:
        # It would give up at the first answer that takes longer than five seconds.
        patient = partial(httpx.Client, timeout=PATIENCE)
        with (
            mock.patch("prefect.server.api.server.httpx.Client", patient),
            mock.patch("prefect.testing.utilities.mkdtemp", return_value=str(made)),
        ):
            harness.enter_context(prefect_test_harness(server_startup_timeout=int(PATIENCE)))
        yield


@pytest.fixture
def random_images() -> Callable[[int, int], np.ndarray]:
    """Makes bytes that look like images: [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    return lambda count, size: rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> str:
    """A run name of the test's own, in the store that all share."""
    return str(abs(hash(request.node.name)))
