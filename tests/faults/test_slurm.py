"""infra/slurm.sh on a real Slurm: a controller here, two nodes that are hosts; jobs that are ended and submitted again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from diffusion.data.sources.source import Source
from diffusion.store.objects import FolderStore
from diffusion.training.journal import JOURNAL
from diffusion.training.state import steps_with_checkpoint
from tests.conftest import TINY
from tests.faults.flow_runs import SMALL, undisturbed, weights
from tests.hosts import HERE, Host, hosts, wait_until
from tests.stack import copy_project

pytestmark = [pytest.mark.slow, pytest.mark.long]

ray = pytest.importorskip("ray", reason="jobs on a cluster need the extra ray")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
    pytest.skip(
        f"needs a Slurm to start: Debian's slurm-wlm and munge bring {', '.join(missing)}", allow_module_level=True
    )

STEPS = 600
EVERY = STEPS // 20
"""Steps between the checkpoints that are made anyway."""
OVERRIDES = SMALL | {
    "data.images": STEPS * TINY["data.batch_size"],
    "evaluation.every_images": STEPS * TINY["data.batch_size"],
}
RECIPE = [f"--set={key}={value}" for key, value in OVERRIDES.items()]
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={here}({address})
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SlurmdParameters=config_overrides
KillWait=60
NodeName={first} NodeAddr={first_address} CPUs=1
NodeName={second} NodeAddr={second_address} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Slurm:
    """Two nodes and the controller, and a copy of the project that all of them see."""

    nodes: list[Host]
    project: Path
    env: dict[str, str]

    def say(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.project, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self) -> str:
        """By the command of the page, with a recipe that ends within minutes. Returns the job's number."""
        for path in self.outputs():
            path.unlink()  # of the job before: what is read is this one's
        (number,) = re.findall(r"\d+", self.say(*documented("sbatch").split(), "--source=generated", *RECIPE))
        return number

    def outputs(self) -> list[Path]:
        """What the ranks of the training have said."""
        return list((self.project / "var/runs").glob("demo-*/output.log"))

    def state(self, job: str) -> str:
        (state,) = re.findall(r"JobState=(\w+)", self.say("scontrol", "show", "job", job))
        return state

    def log(self, job: str) -> str:
        path = self.project / f"train-diffusion-{job}.log"
        return path.read_text() if path.exists() else ""

    def wait_for_end(self, job: str, *states: str) -> None:
        wait_until(lambda: self.state(job) not in UNDER_WAY, lambda: self.log(job)[-3000:])
        assert self.state(job) in states, self.log(job)[-5000:]

    def wait_for_training(self, job: str) -> None:
        """Until both nodes are at it."""

        def trains() -> bool:
            text = "".join(path.read_text() for path in self.outputs())
            return all(f"] on {node.name} ({node.address})" in text.rpartition("step")[0] for node in self.nodes)

        wait_until(lambda: trains() or self.state(job) not in UNDER_WAY, lambda: self.log(job)[-3000:])
        assert trains(), self.log(job)[-3000:]

    def first_step(self) -> int:
        """That the training of the newest job has spoken of."""
        said = "".join(path.read_text() for path in self.outputs())
        return min(int(step) for step in re.findall(r"\[rank 0\] step (\d+)/", said.replace(",", "")))

    def nothing_is_left(self) -> None:
        lines = ("ray", "flows.commands.demo")
        wait_until(
            lambda: not any(node.processes(line) for node in self.nodes for line in lines),
            lambda: "something of the job is left on its nodes",
        )

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.project / "var" / "store")

    def steps(self) -> list[int]:
        """With a checkpoint."""
        runs = {name.split("/")[1] for name in self.store.names("checkpoints/")}
        assert len(runs) <= 1, "submitted again it is the same run"
        return [step for run in runs for step in steps_with_checkpoint(self.store, run)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    copy_project(folder / "project", archive)
    (folder / "state").mkdir()
    (folder / "munge").mkdir(mode=0o711)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    with hosts(folder, 2) as nodes:
        known = {"here": socket.gethostname(), "address": HERE, "folder": folder, "controller": 26817, "daemon": 26818}
        for name, node in zip(("first", "second"), nodes, strict=True):
            known |= {name: node.name, f"{name}_address": node.address}
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**known))
        plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        plain |= {"LANG": "C.UTF-8", "SLURM_CONF": str(folder / "slurm.conf"), "TRAIN_DIFFUSION_COMMIT": "c" * 40}
        made = Slurm(nodes, folder / "project", plain)
        munge = [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={folder}/munge/key",
            f"--socket={folder}/munge/socket",
        ]
        munge += [f"--{kind}={folder}/munge/{kind}" for kind in ("pid-file", "log-file", "seed-file")]
        log = (folder / "daemons.log").open("ab")
        said: dict[str, Any] = {"env": made.env, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        started = [subprocess.Popen(munge, **said)]
        try:
            wait_until((folder / "munge" / "socket").exists, lambda: (folder / "daemons.log").read_text())
            started.append(subprocess.Popen(["slurmctld", "-D"], **said))
            for node in nodes:
                node.start("slurmd", "-D", "-N", node.name, **said)
            idle = ["sinfo", "-h", "-o", "%D %t"]
            wait_until(
                lambda: subprocess.run(idle, env=made.env, capture_output=True, text=True).stdout.strip() == "2 idle",
                lambda: (folder / "daemons.log").read_text()[-3000:],
            )
            yield made
        finally:
            for process in started[::-1]:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
                process.wait()


def documented(program: str) -> str:
    """The first line of docs/cluster.md that begins with it."""
    page = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text()
    return re.findall(rf"^{program} .+$", page, re.MULTILINE)[0]


def test_a_job_that_is_ended_and_submitted_again_ends_with_the_bits_of_one_machine(
    slurm: Slurm, source: Source, tmp_path: Path
) -> None:
    """As at the end of its time, which leaves a checkpoint; then without a warning."""
    ends = 0
    while not any(step % EVERY for step in slurm.steps()):  # one that was made at the end: a regular one may come first
        ends += 1
        assert ends <= 3, slurm.steps()
        job = slurm.submit()
        slurm.wait_for_training(job)
        slurm.say(*documented("scancel").replace("1234", job).split())
        slurm.wait_for_end(job, "FAILED")
        slurm.nothing_is_left()
    left = max(slurm.steps())
    assert left < STEPS

    job = slurm.submit()
    slurm.wait_for_training(job)
    assert slurm.first_step() > left, "it does not go on"
    slurm.say("scancel", job)
    slurm.wait_for_end(job, "CANCELLED")
    slurm.nothing_is_left()
    left = max(slurm.steps())

    job = slurm.submit()
    slurm.wait_for_end(job, "COMPLETED")
    assert "model version" in slurm.log(job), slurm.log(job)[-3000:]
    assert slurm.first_step() > left, "it does not go on"

    (run,) = {name.split("/")[1] for name in slurm.store.names("checkpoints/")}
    found = weights(slurm.store, run, STEPS), (slurm.project / "var/runs" / run / JOURNAL).read_bytes()
    assert found == undisturbed(source, tmp_path, OVERRIDES)


def test_a_node_on_which_ray_does_not_start_is_said_at_once(slurm: Slurm) -> None:
    second = slurm.nodes[1]
    assert second.start("mount", "-t", "tmpfs", "tmpfs", str(Path(ray.__file__).parent)).wait() == 0
    try:
        job = slurm.submit()
        slurm.wait_for_end(job, "FAILED")
        assert "Ray did not start on every node: see above" in slurm.log(job)
        slurm.nothing_is_left()
    finally:
        assert second.start("umount", str(Path(ray.__file__).parent)).wait() == 0
