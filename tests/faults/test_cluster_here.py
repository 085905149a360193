"""`make up ENGINE=ray`: the README's command on a cluster of this machine alone, which nobody else can use."""

from __future__ import annotations

import json
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from diffusion.training.journal import COMMITTED, committed_step
from tests.conftest import PATIENCE, TINY, free_port
from tests.processes import family
from tests.running import Seen, look_at, stack_processes
from tests.stack import running_project

pytestmark = pytest.mark.slow

STEPS = 128
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

pytest.importorskip("ray", reason="jobs on a cluster need the extra ray")


def test_a_rank_is_killed_on_a_cluster_that_listens_to_nobody_else_and_leaves_nothing(archive: Path) -> None:
    overrides = TINY | {"data.images": 16 * STEPS, "evaluation.every_images": 16 * STEPS}
    command = ["prefect", "deployment", "run", "train-diffusion", "-p", "preset=demo", "-p", "source=generated"]
    command += ["-p", f"overrides={json.dumps(overrides)}", "--watch"]
    with tempfile.TemporaryDirectory(prefix="train-diffusion-ray-") as parent:
        wanted = {"TRAIN_DIFFUSION_ENGINE": "ray", "RAY_PORT": str(free_port())}
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
                        # Between two checkpoints, which are written every second step, and before the training ends.
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
            assert not [one.name for one in seen.values() if token in one.arguments]
            assert any("raylet" in one.arguments for one in seen.values())
            ours = list(seen)
        deadline = time.monotonic() + PATIENCE  # workers of Ray end a little after it
        while left := [pid for pid in ours if psutil.pid_exists(pid) and token in _environment(pid)]:
            assert time.monotonic() < deadline, f"make down leaves {left}"
            time.sleep(0.2)
        assert not folder.exists()


def _environment(pid: int) -> str:
    try:
        return json.dumps(psutil.Process(pid).environ())
    except psutil.Error:
        return ""
