"""A training on several hosts, which lose ranks, hosts, links and their driver: it ends with the bits of one machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusion.data.ingest import ingest
from diffusion.data.manifest import Manifest
from diffusion.data.sources.source import Source
from diffusion.evaluation.scores import find_scores
from diffusion.jobs.specs import TrainingJob
from diffusion.store import layout
from diffusion.store.objects import FolderStore, open_store
from diffusion.training.journal import JOURNAL, records
from diffusion.training.state import load_state, steps_with_checkpoint
from flows.commands.demo import EMBEDDED
from flows.launcher import run_job
from flows.prefect_database import make_prefect_current
from tests.conftest import TINY, lay_out, start_s3, tiny_recipe
from tests.faults.report import Kill
from tests.faults.s3_proxy import Faults, proxy
from tests.hosts import HERE, PATIENCE, Cluster, hosts, sh, wait_until
from tests.processes import signal_all

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="jobs on a cluster need the extra ray")

STEPS, EVERY = 150, 10
PACE, SLOWLY = 0.3, 2.0
"""Seconds that each file of a checkpoint takes while a training is struck: it waits, and need not compute meanwhile."""
STORE = "s3://tests/store"
RANK = "ray::Worker"
"""How Ray calls a rank's process."""


class Machines:
    """A head and two hosts with a rank each, and S3 on a fourth address."""

    def __init__(self, cluster: Cluster, dataset: Manifest, empty_mlflow: Path) -> None:
        self.cluster, self.dataset, self.store, self.empty_mlflow = cluster, dataset, open_store(STORE), empty_mlflow
        self.pace = 0.0
        """Seconds that a write to the store takes longer than it need."""
        self.head, self.first, self.second = cluster.hosts
        self.expected: dict[int, str] = {}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, source: Source, empty_mlflow: Path) -> Iterator[Machines]:
    folder = tmp_path_factory.mktemp("hosts")
    with hosts(folder, 3) as made, pytest.MonkeyPatch.context() as patch:
        s3, faults = start_s3(tmp_path_factory.mktemp("s3"), HERE), Faults()
        try:
            with proxy(s3.server.url, faults, HERE) as url:
                for name, value in (s3.env | {"AWS_ENDPOINT_URL_S3": url}).items():
                    patch.setenv(name, value)
                cluster = Cluster.on(made)
                cluster.start()
                machines = Machines(cluster, ingest(source, open_store(STORE), shard_bytes=60_000), empty_mlflow)
                faults.on_put = lambda path: time.sleep(machines.pace)
                yield machines
        finally:
            s3.kill()


class Trial:
    """One training, in a process of its own on the head as the flow would run it."""

    def __init__(
        self,
        machines: Machines,
        folder: Path,
        name: str,
        counts: tuple[int, ...] = (2,),
        steps: int = STEPS,
        every: int = EVERY,
    ) -> None:
        self.machines, self.folder, self.name, self.steps = machines, folder / name, name, steps
        self.folder.mkdir()
        shutil.copy(machines.empty_mlflow, self.folder / "mlflow.db")
        job = training(machines, name, folder, steps, every)
        told = {
            "job": job.model_dump(mode="json"),
            "tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
            "counts": counts,
        }
        (self.folder / "caller.json").write_text(json.dumps(told))

    def begin(self) -> subprocess.Popen[bytes]:
        log = (self.folder / "caller.log").open("ab")
        command = (sys.executable, "-m", "tests.faults.caller", str(self.folder))
        return self.machines.head.start(*command, env=self.machines.cluster.env, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return (self.folder / "caller.log").read_text()

    def step(self) -> int:
        """Of the newest checkpoint."""
        return max(steps_with_checkpoint(self.machines.store, self.name), default=0)

    def reach(self, step: int, caller: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: self.step() >= step or caller.poll() is not None, lambda: self.log[-3000:])
        assert caller.poll() is None, self.log[-3000:]

    def finish(self, caller: subprocess.Popen[bytes]) -> None:
        assert caller.wait(PATIENCE) == 0, self.log[-4000:]
        assert result(self.name, self.steps) == expected(self.machines, self.folder, self.steps)
        journal = (self.folder / JOURNAL).read_bytes()
        assert [record["step"] for record in records(journal)] == list(range(1, self.steps + 1))
        from diffusion.tracking.connection import connect

        client, run = connect(f"sqlite:///{self.folder}/mlflow.db"), (self.folder / "mlflow_run").read_text()
        points = [(point.step, point.value) for point in client.get_metric_history(run, "train/loss")]
        assert points == [(record["step"], record["loss"]) for record in records(journal)], "each point once"
        self.nothing_is_left()

    def nothing_is_left(self) -> float:
        """Seconds until no rank and no driver runs on any host; but one that is cut off finds out by itself, in minutes."""
        began = time.monotonic()
        alive = [host for host in self.machines.cluster.hosts if host.alive and not host.cut_off]
        wait_until(
            lambda: not any(host.processes(line) for host in alive for line in (RANK, "flows.engines.driver")),
            lambda: "ranks or their driver are left",
        )
        return time.monotonic() - began


def training(machines: Machines, name: str, folder: Path, steps: int, every: int = EVERY) -> TrainingJob:
    recipe = tiny_recipe(
        data__images=16 * steps,
        data__lanes=2,
        network__width=8,
        network__multipliers=[1, 2],
        evaluation__every_images=16 * steps,
    )
    return TrainingJob(
        run=name,
        store=STORE,
        dataset=machines.dataset.digest,
        shard_copies=folder / "copies",
        recipe=recipe,
        until=steps,
        checkpoint_every=every,
    )


def expected(machines: Machines, folder: Path, steps: int) -> str:
    """The result of one process on this machine."""
    if steps not in machines.expected:
        name = f"alone-{steps}"
        job = training(machines, name, folder, steps, every=steps)
        run_job("diffusion.training.job", job, folder / name, 1, threads=1)
        machines.expected[steps] = result(name, steps)
    return machines.expected[steps]


def result(run: str, step: int) -> str:
    store = open_store(STORE)
    names = [one for one in store.names(f"{layout.checkpoint(run, step)}/") if not one.endswith("state.json")]
    assert len(names) == 4
    return hashlib.sha256(b"".join(store.read(one) for one in names)).hexdigest()


Tell = Callable[[list[Kill]], None]


@pytest.fixture(autouse=True)
def nothing_goes_on(machines: Machines) -> Iterator[None]:
    """What a test that failed has left takes no room from the next."""
    yield
    machines.pace = 0.0
    if machines.head.alive:
        for line in ("tests.faults.caller", "flow.py", "flows.engines.driver"):
            signal_all(machines.head.processes(line), signal.SIGKILL)


def test_one_training_outlives_its_ranks_hosts_and_links(machines: Machines, tmp_path: Path, tell: Tell) -> None:
    """Struck again and again, it goes on by itself each time, to the bits of one machine; with two hosts where there are two."""
    # More steps than four strikes take, however slowly a host joins.
    trial, second = Trial(machines, tmp_path, "struck", (1, 2), steps=250), machines.second
    kills: list[Kill] = []
    machines.pace = PACE
    caller = trial.begin()
    trial.reach(10, caller)
    assert f"[rank 0] on {machines.first.name}" in trial.log or f"[rank 1] on {machines.first.name}" in trial.log
    assert f"] on {second.name} ({second.address})" in trial.log

    def strike(what: str, harm: Callable[[], None]) -> None:
        step, began = trial.step(), time.monotonic()
        harm()
        trial.reach(trial.step() + EVERY, caller)
        kills.append(Kill("hosts", f"hosts: {what}", "mid-run", step, 0.0, round(time.monotonic() - began, 1), True))

    def kill_a_rank() -> None:
        (rank,) = second.processes(RANK)
        rank.kill()

    def cut_for_a_while() -> None:
        second.cut()
        time.sleep(20)
        second.heal()

    def come_back() -> None:
        """A host that was lost is started again and joins: the training takes it in."""
        second.die()  # Ray has given it up
        machines.pace = SLOWLY
        second.boot()
        machines.cluster.join(second)
        more = "There is more room: going on with 2 processes in place of 1."
        wait_until(
            lambda: more in trial.log or caller.poll() is not None,
            lambda: trial.log[-3000:],
        )
        machines.pace = PACE
        wait_until(
            lambda: "[rank 1] on" in trial.log.partition(more)[2] or caller.poll() is not None,
            lambda: trial.log[-3000:],
        )
        assert caller.poll() is None, trial.log[-3000:]

    strike("a rank", kill_a_rank)
    assert "Going on from the newest checkpoint (1 of 5 times)" in trial.log
    strike("a link, for 20 seconds", cut_for_a_while)
    strike("a host that joins", come_back)
    strike("a link, for good", second.cut)
    second.heal()
    machines.pace = 0.0
    trial.finish(caller)
    tell(kills)
    second.die()
    second.boot()
    machines.cluster.join(second)


FLOW = """
import json, sys
from flows.train_diffusion import train_diffusion
if __name__ == "__main__":
    report = train_diffusion(source="generated", preset="demo", overrides=json.loads(sys.argv[1]), processes=sys.argv[2],
                             fid_bar=1000.0)
    print(report.rows["model version"])
"""


def test_the_flow_trains_on_the_hosts_what_it_trains_here(
    machines: Machines, archive: Path, empty_mlflow: Path, tmp_path: Path
) -> None:
    """Training, evaluation and the measuring of real images; afterwards nothing of them is on the other hosts but copies."""
    (tmp_path / "flow.py").write_text(FLOW)
    overrides = json.dumps(TINY | {"data.images": 64, "evaluation.every_images": 64})
    ran, found = {}, []
    for where in ("here", "hosts"):
        home = tmp_path / where
        lay_out(home, archive)
        shutil.copy(empty_mlflow, home / "mlflow.db")
        make_prefect_current(home / "prefect" / "prefect.db")
        env = machines.cluster.env | {
            "TRAIN_DIFFUSION_HOME": str(home),
            "TRAIN_DIFFUSION_STORE": f"s3://tests/{where}",
            "TRAIN_DIFFUSION_ENGINE": "ray" if where == "hosts" else "local",
            "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
            "PREFECT_HOME": str(home / "prefect"),
            **EMBEDDED,
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(PATIENCE)),
            "PYTHONPATH": str(Path.cwd()),
        }
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):  # of whoever runs the tests
            env.pop(name, None)
        command = (sys.executable, str(tmp_path / "flow.py"), overrides, "2" if where == "hosts" else "1")
        ran[where] = machines.head.start(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for where, flow in ran.items():
        output = flow.communicate(timeout=PATIENCE)[0].decode()
        assert "champion. It is the first version" in output, output[-4000:]
        store = open_store(f"s3://tests/{where}")
        (run,) = {name.split("/")[1] for name in store.names("checkpoints/")}
        scores = find_scores(store, run, 4, TINY["evaluation.samples"])
        assert scores is not None
        found.append((load_state(store, run, 4).sha256, scores))
    assert found[0] == found[1]
    logs = [path.read_text() for path in (tmp_path / "hosts" / "runs").rglob("output.log")]
    assert len(logs) == 3, "measuring real images, training, evaluation"
    for log in logs:
        assert {host.name for host in (machines.first, machines.second) if f"] on {host.name} (" in log} == {
            machines.first.name,
            machines.second.name,
        }
    from diffusion.tracking.connection import connect

    client = connect(f"sqlite:///{tmp_path}/hosts/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    seen = {name.split("/")[1] for name in tracked.data.metrics if name.startswith("system/")}
    assert seen == {machines.first.name, machines.second.name}, "what the hosts do, not what the flow's machine does"


@pytest.mark.long
def test_one_training_outlives_what_began_it(machines: Machines, tmp_path: Path, tell: Tell) -> None:
    """A host dies; the flow is killed, then cancelled; the head dies and the flow with it: each next start goes on."""
    trial = Trial(machines, tmp_path, "begun-again", (1, 2))
    machines.pace = PACE
    caller = trial.begin()
    trial.reach(10, caller)
    step, began = trial.step(), time.monotonic()
    machines.second.die()
    trial.reach(step + EVERY, caller)
    kills = [Kill("hosts", "hosts: a host", "mid-run", step, 0.0, round(time.monotonic() - began, 1), True)]
    machines.second.boot()  # and takes no part until the cluster starts anew
    for what in (signal.SIGKILL, signal.SIGTERM, "the head"):
        step, gone = trial.step(), 0.0
        if isinstance(what, signal.Signals):
            signal_all(machines.head.processes("tests.faults.caller"), what)
            caller.wait(PATIENCE)
            gone = round(trial.nothing_is_left(), 1)
        else:
            machines.head.die()
            caller.wait(PATIENCE)
            for host in (machines.first, machines.second):  # without a head they end by themselves, in time
                host.die()
                host.boot()
            machines.head.boot()
            machines.cluster.start()
        left, began = trial.step(), time.monotonic()
        assert left >= step
        caller = trial.begin()
        trial.reach(left + EVERY, caller)
        seconds = round(time.monotonic() - began, 1)
        name = f"the flow, {what.name}" if isinstance(what, signal.Signals) else what
        kills.append(Kill("hosts", f"hosts: {name}", "mid-run", step, gone, seconds, True))
    machines.pace = 0.0
    trial.finish(caller)
    tell(kills)


@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_whose_flow_ends_leaves_a_checkpoint_where_it_is(
    machines: Machines, tmp_path: Path, what: signal.Signals
) -> None:
    """It has written none before."""
    steps = 1900  # more than it does until it is asked
    trial = Trial(machines, tmp_path, f"ended-{what.name}", steps=steps, every=steps)
    caller = trial.begin()
    wait_until(lambda: "[rank 0] step " in trial.log or caller.poll() is not None, lambda: trial.log[-3000:])
    assert trial.step() == 0
    signal_all(machines.head.processes("tests.faults.caller"), what)
    assert caller.wait(PATIENCE) != 0, trial.log[-3000:]
    trial.nothing_is_left()
    assert 0 < trial.step() < steps


def test_what_is_wrong_is_said_once(machines: Machines, tmp_path: Path) -> None:
    """A folder that other hosts do not see."""
    private = tmp_path / "only-here"
    ingest_again = FolderStore(private / "store")
    for name in open_store(STORE).names("datasets/"):
        ingest_again.write(name, open_store(STORE).read(name))
    trial = Trial(machines, tmp_path, "blind")
    told = json.loads((trial.folder / "caller.json").read_text())
    told["job"]["store"] = ingest_again.uri
    (trial.folder / "caller.json").write_text(json.dumps(told))
    for host in (machines.first, machines.second):
        hidden = host.start("mount", "-t", "tmpfs", "tmpfs", str(private))
        assert hidden.wait() == 0
    caller = trial.begin()
    assert caller.wait(PATIENCE) == 1
    assert "does not see what the flow's machine writes to the store" in trial.log
    assert "Going on" not in trial.log
    trial.nothing_is_left()


def test_a_host_without_the_environment_is_said_once(machines: Machines, tmp_path: Path) -> None:
    torch = Path(sys.executable).parent.parent / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    torch = torch / "site-packages" / "torch"
    assert machines.second.start("mount", "-t", "tmpfs", "tmpfs", str(torch)).wait() == 0
    try:
        trial = Trial(machines, tmp_path, "without-torch")
        caller = trial.begin()
        assert caller.wait(PATIENCE) == 1
        assert "can't run a worker" in trial.log
        assert "Every host needs this project's environment: make ray." in trial.log
        assert "Going on" not in trial.log
        trial.nothing_is_left()
    finally:
        assert machines.second.start("umount", str(torch)).wait() == 0


def test_a_store_that_one_host_does_not_reach_is_said_with_its_name(machines: Machines, tmp_path: Path) -> None:
    sh("ip", "-n", machines.second.name, "route", "add", "unreachable", f"{HERE}/32")
    try:
        trial = Trial(machines, tmp_path, "unreachable")
        caller = trial.begin()
        assert caller.wait(PATIENCE) == 1
        assert f"(on {machines.second.name} ({machines.second.address}))" in trial.log
        assert "Going on" not in trial.log
        trial.nothing_is_left()
    finally:
        sh("ip", "-n", machines.second.name, "route", "del", "unreachable", f"{HERE}/32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RAY_ADDRESS": "10.77.0.99:6379"}, "The Ray cluster at 10.77.0.99:6379 can't be used"),
        ({"RAY_AUTH_TOKEN": "0" * 32}, "The Ray cluster at 10.77.0.11:6379"),
        ({}, "needs 4 processes with 1 CPU each"),
    ],
)
def test_a_cluster_that_can_t_be_used(machines: Machines, change: dict[str, str], said: str) -> None:
    code = "from flows.engines.known import engine; from tests.conftest import tiny_recipe;"
    code += "print(engine().workers(tiny_recipe(data__lanes=4), 4))"
    env = machines.cluster.env | {"TRAIN_DIFFUSION_ENGINE": "ray"} | change
    asked = machines.head.start(sys.executable, "-c", code, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = asked.communicate(timeout=PATIENCE)
    assert said in output.decode(), output.decode()[-3000:]
    assert "ClusterError" in output.decode()
