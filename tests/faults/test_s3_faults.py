"""The S3 store on bad days, through a proxy that fails on purpose, in front of a real server: nothing is lost, nothing is twice."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from diffusion.data.ingest import ingest
from diffusion.data.manifest import find_dataset
from diffusion.data.sources.eurosat import Source
from diffusion.errors import StoreError, StoreRefuses
from diffusion.jobs.specs import TrainingJob
from diffusion.store.objects import open_store
from diffusion.store.s3 import S3Store
from diffusion.training.checkpoint import load_checkpoint
from diffusion.training.journal import JOURNAL, records
from diffusion.training.state import steps_with_checkpoint
from tests.conftest import PATIENCE, Ingested, S3Server, start_s3, tiny_recipe
from tests.faults.report import SEED, Kill
from tests.faults.s3_proxy import Faults, proxy
from tests.jobs import start

pytestmark = pytest.mark.slow


@pytest.fixture
def through(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Credentials are set; `through_proxy` puts the proxy in between."""
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    with ExitStack() as stack:
        yield stack


def through_proxy(stack: ExitStack, faults: Faults, monkeypatch: pytest.MonkeyPatch, s3: dict[str, str]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stack.enter_context(proxy(s3["AWS_ENDPOINT_URL_S3"], faults)))


def test_what_is_written_is_read_whatever_the_network_does(
    through: ExitStack, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(unavailable=0.15, cut=0.2, slow=0.1, lost_answer=0.1, seed=3)
    through_proxy(through, faults, monkeypatch, s3)
    store = open_store("s3://tests/bad-day")
    rng = random.Random(0)
    objects = {f"objects/{i}": rng.randbytes(rng.randrange(1, 200_000)) for i in range(40)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: store.write(*item), objects.items()))
    assert store.names("objects/") == sorted(objects)
    assert all(store.read(name) == data for name, data in objects.items())
    assert {what for what, count in faults.seen.items() if count} == {"unavailable", "cut", "slow", "lost_answer"}


def test_large_objects_go_in_parts_and_arrive_whole(
    through: ExitStack, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []
    through_proxy(through, Faults(on_put=paths.append, unavailable=0.1), monkeypatch, s3)
    monkeypatch.setattr("diffusion.store.s3.PART_BYTES", 5 << 20)
    store, data = open_store("s3://tests/large"), random.Random(1).randbytes(17 << 20)
    store.write("large", data)
    assert len({path.split("partNumber=")[1].split("&")[0] for path in paths if "partNumber=" in path}) == 4
    assert store.read("large") == data


def test_creating_is_done_once_also_when_the_answer_was_lost(
    through: ExitStack, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(lost_answer=0.5, seed=1)
    through_proxy(through, faults, monkeypatch, s3)
    store = open_store("s3://tests/create")
    for index in range(10):
        assert store.create(f"n{index}", b"mine")
        assert store.create(f"n{index}", b"mine"), "the same again is no conflict"
        assert not store.create(f"n{index}", b"another's")
        assert store.read(f"n{index}") == b"mine"
    assert faults.seen["lost_answer"] > 3


def test_a_server_that_stays_away_is_said_and_not_waited_for_forever(
    through: ExitStack, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    through_proxy(through, Faults(unavailable=1.0), monkeypatch, s3)
    with pytest.raises(StoreError, match="can't be written"):
        open_store("s3://tests/away").write("a", b"1")


def job_on_s3(run: str, dataset: str, tmp_path: Path, steps: int, every: int) -> TrainingJob:
    return TrainingJob(
        run=run,
        store="s3://tests/training",
        dataset=dataset,
        shard_copies=tmp_path / "copies",
        recipe=tiny_recipe(
            data__images=16 * steps,
            data__lanes=2,
            network__width=8,
            network__multipliers=[1, 2],
            evaluation__every_images=16 * steps,
        ),
        until=steps,
        checkpoint_every=every,
    )


def test_training_over_a_bad_network_and_killed_in_mid_upload_ends_with_the_same_weights(
    through: ExitStack,
    s3: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    source: Source,
    ingested: Ingested,
    tmp_path: Path,
) -> None:
    steps, every, uploads = 60, 10, [7, 13, 16]
    quiet = job_on_s3("quiet", ingested.manifest.digest, tmp_path, steps, every).model_copy(
        update={"store": ingested.store.uri, "run": "quiet-s3"}
    )
    start(tmp_path / "quiet", quiet, "diffusion.training.job", 1)

    puts = 0
    killed: list[int] = []
    rank_0: list[psutil.Process] = []

    def kill_in_upload(path: str) -> None:
        nonlocal puts
        if "/checkpoints/" in path:
            puts += 1
            if puts in uploads and rank_0:
                killed.append(puts)
                rank_0[0].kill()

    faults = Faults(unavailable=0.05, cut=0.05, slow=0.1, lost_answer=0.05, listing_lag=3.0, on_put=kill_in_upload)
    through_proxy(through, faults, monkeypatch, s3)
    store = open_store("s3://tests/training")
    assert isinstance(store, S3Store)
    ingest(source, store, shard_bytes=60_000)
    deadline = time.monotonic() + PATIENCE
    while find_dataset(store, source.digest) is None:
        assert time.monotonic() < deadline
    job = job_on_s3("faulty", source.digest, tmp_path, steps, every)
    folder = tmp_path / "faulty"
    folder.mkdir()
    (folder / "told.json").write_text(job.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from diffusion.jobs.specs import TrainingJob; from flows.launcher import run_job\n"
        "told = Path(sys.argv[1]); job = TrainingJob.model_validate_json(told.read_bytes())\n"
        "run_job('diffusion.training.job', job, told.parent, 2, threads=1)"
    )
    command = [sys.executable, "-c", code, str(folder / "told.json")]
    for _ in range(len(uploads) + 4):
        rank_0.clear()
        caller = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while caller.poll() is None:
            for child in psutil.Process(caller.pid).children() if not rank_0 else []:
                try:
                    if child.environ().get("RANK") == "0":
                        rank_0.append(child)
                except psutil.Error:
                    continue
            time.sleep(0.05)
        if caller.returncode == 0:
            break
    assert caller.returncode == 0
    assert killed == uploads
    expected, found = load_checkpoint(ingested.store, "quiet-s3", steps)[0], load_checkpoint(store, "faulty", steps)[0]
    assert found.sha256 == expected.sha256
    assert faults.seen["listing_lag"] > 0


def test_keys_that_expire_end_a_training_while_little_is_lost(
    through: ExitStack, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, source: Source, tmp_path: Path
) -> None:
    steps, every = 80, 10
    faults = Faults()

    def expire(path: str) -> None:
        faults.expired |= f"/{3 * every:09d}/" in path

    faults.on_put = expire
    through_proxy(through, faults, monkeypatch, s3)
    store = open_store("s3://tests/training")
    job = job_on_s3("expires", ingest(source, store, shard_bytes=60_000).digest, tmp_path, steps, every)
    with pytest.raises(StoreRefuses, match="ExpiredToken"):
        start(tmp_path / "expires", job, "diffusion.training.job", 1)
    assert records((tmp_path / "expires" / JOURNAL).read_bytes())[-1]["step"] <= 5 * every
    faults.expired, faults.on_put = False, None
    assert max(steps_with_checkpoint(store, "expires")) == 2 * every
    start(tmp_path / "expires", job.model_copy(update={"checkpoint_every": steps}), "diffusion.training.job", 1)
    assert [one["step"] for one in records((tmp_path / "expires" / JOURNAL).read_bytes())] == list(range(1, steps + 1))


def test_the_server_itself_is_killed_at_random_moments(
    monkeypatch: pytest.MonkeyPatch,
    source: Source,
    ingested: Ingested,
    tmp_path: Path,
    tell: Callable[[list[Kill]], None],
) -> None:
    """Three times it is killed and stays away for a while; a job that this ends is begun again, as the flow does."""
    steps, every = 90, 10
    moments = random.Random(SEED)
    kills = sorted(moments.sample(range(15, 75), 3))
    away = [moments.uniform(1, 6) for _ in kills]
    quiet = job_on_s3("quiet", ingested.manifest.digest, tmp_path, steps, every)
    quiet = quiet.model_copy(update={"store": ingested.store.uri, "run": "quiet-server"})
    start(tmp_path / "quiet", quiet, "diffusion.training.job", 1)

    (tmp_path / "s3").mkdir()
    server = start_s3(tmp_path / "s3")
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    done: list[Kill] = []
    folder = tmp_path / "killed"
    killer = threading.Thread(target=kill_server_at, args=(server, folder / JOURNAL, kills, away, done), daemon=True)
    try:
        store = open_store("s3://tests/training")
        dataset = ingest(source, store, shard_bytes=60_000).digest
        job = job_on_s3("killed", dataset, tmp_path, steps, every)
        killer.start()
        for attempt in range(12):
            try:
                start(folder, job, "diffusion.training.job", 1)
                break
            except StoreError:
                assert attempt < 11
                time.sleep(5)
        killer.join(PATIENCE)
        expected = load_checkpoint(ingested.store, "quiet-server", steps)[0]
        found = load_checkpoint(store, "killed", steps)[0]
    finally:
        server.kill()
    assert found.sha256 == expected.sha256
    assert len(done) == len(kills)
    tell(done)


def kill_server_at(server: S3Server, journal: Path, kills: list[int], away: list[float], done: list[Kill]) -> None:
    """Kill it when the training has come to each of these steps, and start it again after a while."""
    for number, (step, seconds) in enumerate(zip(kills, away, strict=True)):
        while not (journal.exists() and (found := records(journal.read_bytes())) and found[-1]["step"] >= step):
            time.sleep(0.02)
        server.kill()
        time.sleep(seconds)
        server.restart()
        done.append(Kill(f"s3-{number}", "the S3 server", "training", step, 0.0, round(seconds, 1), True))
