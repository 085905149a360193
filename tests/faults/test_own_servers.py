"""The pages' words for servers of one's own: PostgreSQL and S3 below `make up ENGINE=ray`, and then its servers as somebody else's.

The cluster is this machine alone, and nobody else can use it. A rank is killed on it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil
import pytest
from sqlalchemy import create_engine, text

from diffusion.training.journal import COMMITTED, committed_step
from tests.conftest import PATIENCE, free_port, start_s3
from tests.faults.flow_runs import SMALL, kill_all
from tests.postgres import programs, running_postgres
from tests.processes import family
from tests.running import Seen, look_at, stack_processes
from tests.servers import Servers
from tests.stack import Project, copy_project, running_project
from tests.typed import ROOT, blocks

pytestmark = [pytest.mark.slow, pytest.mark.long]

STEPS = 256
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

pytest.importorskip("ray", reason="jobs on a cluster need the extra ray")


@contextmanager
def own_servers(folder: Path) -> Iterator[dict[str, str]]:
    """PostgreSQL, where the machine has one, made ready with the SQL of the page, and S3; gives what the page has a shell export."""
    (sql,) = blocks("docs/operations.md", "Servers of your own", "sql")
    typed, _ = blocks("docs/operations.md", "Servers of your own", "bash")
    assert typed.endswith("\nmake up\n")
    s3 = start_s3(folder)
    try:
        with running_postgres(free_port()) if programs() else nullcontext("") as database:
            if database:
                engine = create_engine(database, isolation_level="AUTOCOMMIT")
                with engine.connect() as administrator:
                    for statement in sql.strip().split("\n"):
                        administrator.execute(text(statement))
                engine.dispose()
            else:
                typed = "".join(line for line in typed.splitlines(keepends=True) if "db.example.org" not in line)
            own = {
                "my-bucket": "tests",
                "https://s3.example.org": s3.server.url,
                "MY-KEY": s3.env["AWS_ACCESS_KEY_ID"],
                "MY-SECRET": s3.env["AWS_SECRET_ACCESS_KEY"],
            }
            if database:
                own["db.example.org:5432"] = database.rpartition("@")[2].removesuffix("/postgres")
            yield exported(typed.removesuffix("make up\n"), own)
    finally:
        s3.kill()


def exported(typed: str, own: dict[str, str]) -> dict[str, str]:
    """What a shell has exported after these lines, with names and passwords of one's own."""
    for word, value in own.items():
        assert word in typed
        typed = typed.replace(word, value)
    base = {"PATH": os.environ["PATH"]}
    shell = subprocess.run(["bash", "-e"], input=f"{typed}env -0", env=base, check=True, capture_output=True, text=True)
    found = dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
    return {name: value for name, value in found.items() if name not in (*base, "PWD", "SHLVL", "_")}


def test_on_one_s_own_servers_a_rank_is_killed_nobody_else_is_heard_and_nothing_is_left(
    archive: Path, tmp_path: Path
) -> None:
    overrides = SMALL | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS}
    command = ["prefect", "deployment", "run", "train-diffusion", "-p", "preset=demo", "-p", "source=generated"]
    command += ["-p", f"overrides={json.dumps(overrides)}", "--watch"]
    with (
        tempfile.TemporaryDirectory(prefix="train-diffusion-ray-") as parent,
        own_servers(tmp_path) as own,
    ):
        wanted = own | {"TRAIN_DIFFUSION_ENGINE": "ray", "RAY_PORT": str(free_port())}
        with running_project(Path(parent), archive, **wanted) as project:
            token = (project.folder / "var/stack/ray-token").read_text()
            typed = subprocess.Popen(
                command, cwd=project.folder, env=project.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            seen: dict[int, Seen] = {}
            killed = False
            while typed.poll() is None:
                for root in stack_processes(project):
                    for process in family(root):
                        look_at(process, seen)
                        # Between two checkpoints, of which there are twenty, and before the training ends.
                        if not killed and "ray::Worker.run" in seen.get(process.pid, Seen("", "", {})).arguments:
                            steps = [
                                committed_step(path.parent)
                                for path in (project.folder / "var/runs").glob(f"demo-*/{COMMITTED}")
                            ]
                            if steps and max(steps) < STEPS // 2:
                                with suppress(psutil.NoSuchProcess):
                                    process.kill()
                                    killed = True
                time.sleep(0.2)
            assert typed.stdout is not None
            printed = typed.stdout.read().decode()
            assert typed.returncode == 0, printed[-3000:]
            (log,) = (project.folder / "var/runs").glob("demo-*/output.log")
            assert killed
            assert "Going on from the newest checkpoint (1 of 5 times)" in log.read_text()
            assert not [(one.listens, one.name) for one in seen.values() if not one.listens <= LOOPBACK]
            folder = Path((project.folder / "var/stack/ray-folder").read_text())
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            secrets = [token, own["AWS_SECRET_ACCESS_KEY"], "PREFECT-PASSWORD", "MLFLOW-PASSWORD"]
            assert not [one.name for one in seen.values() if any(secret in one.arguments for secret in secrets)]
            assert any("raylet" in one.arguments for one in seen.values())
            ours = list(seen)
            assert [run["status"] for run in Servers.of(project.servers).runs()] == ["FINISHED"]
            databases = {path.name for path in (project.folder / "var").rglob("*.db")}
            assert databases & {"prefect.db", "mlflow.db"} == (set() if programs() else {"prefect.db", "mlflow.db"})
            assert not (project.folder / "var/store").exists()
            somebody_else_s(project, own, archive, tmp_path / "elsewhere")
            if programs():
                (upgrade,) = re.findall(r"`(python -c .*mlflow\.db.*?)`", (ROOT / "docs/operations.md").read_text())
                upgraded = project.shell("bash", "-c", f"source .venv/bin/activate && {upgrade}")
                assert upgraded.returncode == 0, upgraded.stderr
        deadline = time.monotonic() + PATIENCE  # workers of Ray end a little after it
        while left := [pid for pid in ours if psutil.pid_exists(pid) and token in _environment(pid)]:
            assert time.monotonic() < deadline, f"make down leaves {left}"
            time.sleep(0.2)
        assert not folder.exists()
        forgetful = {name: value for name, value in project.env.items() if name not in own}
        for command in (["make", "up"], [sys.executable, "infra/service.py", "install"]):
            again = subprocess.run(command, cwd=project.folder, env=forgetful, capture_output=True, text=True)
            assert again.returncode != 0
            assert "TRAIN_DIFFUSION_STORE, which this shell does not set" in again.stderr
        assert not stack_processes(project)
        assert not (project.folder / "var/stack/service.json").exists()


def somebody_else_s(project: Project, own: dict[str, str], archive: Path, folder: Path) -> None:
    """A worker in another folder takes runs of these servers, by the words of the page."""
    copy_project(folder, archive)
    _, typed = blocks("docs/operations.md", "Servers of your own", "bash")
    servers = project.servers
    password = servers["MLFLOW_TRACKING_PASSWORD"]
    words = {
        "https://prefect.example.org/api": servers["PREFECT_API_URL"],
        "https://mlflow.example.org": servers["MLFLOW_TRACKING_URI"],
        "PREFECT-PASSWORD": password,
        "MLFLOW-PASSWORD": password,
    }
    for word, value in words.items():
        assert word in typed
        typed = typed.replace(word, value)
    store = {name: value for name, value in own.items() if name.startswith(("AWS_", "TRAIN_DIFFUSION_STORE"))}
    env = {name: project.env[name] for name in ("HOME", "PATH", "LANG", "OMP_NUM_THREADS")} | store
    log = folder / "worker.log"
    script = folder / "typed.sh"  # passwords are no arguments
    script.write_text(typed)
    kill_all(project, "worker")  # theirs is the only one
    with log.open("wb") as output:
        worker = subprocess.Popen(["bash", "-e", str(script)], cwd=folder, env=env, stdout=output, stderr=output)
    try:
        asked = project.shell("prefect", "deployment", "run", "train-diffusion", "-p", "source=/no/such.zip")
        assert asked.returncode == 0, asked.stdout + asked.stderr
        deadline = time.monotonic() + PATIENCE
        while "There are no images at /no/such.zip" not in (said := log.read_text(errors="replace")):
            assert worker.poll() is None, said[-3000:]
            assert time.monotonic() < deadline, said[-3000:]
            time.sleep(0.5)
    finally:
        for process in family(psutil.Process(worker.pid)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        worker.wait()


def _environment(pid: int) -> str:
    try:
        return json.dumps(psutil.Process(pid).environ())
    except psutil.Error:
        return ""
