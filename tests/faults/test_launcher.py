"""The launcher: errors travel, output is forwarded, and nothing of a job's tree is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from diffusion.errors import DataError
from diffusion.jobs.specs import JobSpec
from flows.launcher import Listener, run_job
from tests.conftest import PATIENCE
from tests.processes import wait_until_ended

pytestmark = pytest.mark.slow


@pytest.fixture
def job_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A job module on the path of this process and those that it starts; what it does is in its spec's `run`."""
    (tmp_path / "job_of_the_test.py").write_text(
        textwrap.dedent(
            """
            import os, signal, time
            from diffusion.errors import DataError
            from diffusion.jobs.rank import rank_main
            from diffusion.jobs.reports import ProgressFile
            from diffusion.jobs.specs import JobSpec

            def body(spec, rank):
                folder, accelerator = rank.folder, rank.accelerator
                (folder / f"pid-{accelerator.process_index}").write_text(str(os.getpid()))
                print(f"hello from rank {accelerator.process_index}", flush=True)
                ProgressFile(folder, accelerator.is_main_process).write("working", 1, 1)
                if spec.run == "user-error":
                    raise DataError("shard 3 is damaged")
                if spec.run == "crash" and accelerator.process_index == 1:
                    raise ZeroDivisionError("rank one divides by zero")
                if spec.run == "stubborn":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    (folder / f"ignores-{accelerator.process_index}").touch()
                if spec.run in ("for-ever", "crash", "stubborn"):
                    time.sleep(600)

            if __name__ == "__main__":
                rank_main(JobSpec, body)
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "job_of_the_test"


def spec(what: str, tmp_path: Path) -> JobSpec:
    return JobSpec(run=what, store="x", dataset="0" * 64, shard_copies=tmp_path)


def test_output_and_progress_reach_the_caller(job_module: str, tmp_path: Path) -> None:
    lines: list[str] = []
    progress: list[dict[str, object]] = []
    run_job(job_module, spec("well", tmp_path), tmp_path / "job", 2, Listener(progress.append, lines.append))
    assert {"[rank 0] hello from rank 0", "[rank 1] hello from rank 1"} <= set(lines)
    assert progress[-1] == {"stage": "working", "done": 1, "total": 1, "note": ""}


def test_an_error_for_the_user_stays_what_it_is(job_module: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard 3 is damaged"):
        run_job(job_module, spec("user-error", tmp_path), tmp_path / "job", 1)


def test_a_crash_brings_the_rank_and_its_traceback(job_module: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 failed[\s\S]*rank one divides by zero"):
        run_job(job_module, spec("crash", tmp_path), tmp_path / "job", 2)
    assert_gone(tmp_path / "job")


def test_whatever_ends_the_caller_s_wait_ends_the_job(job_module: str, tmp_path: Path) -> None:
    class EnoughError(BaseException):
        pass

    def stop_at_once(progress: object) -> None:
        if all((tmp_path / "job" / f"pid-{rank}").exists() for rank in (0, 1)):
            raise EnoughError

    with pytest.raises(EnoughError):
        run_job(job_module, spec("for-ever", tmp_path), tmp_path / "job", 2, Listener(stop_at_once))
    assert_gone(tmp_path / "job")


def test_ranks_that_ignore_the_request_are_killed(
    job_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.launcher.GRACE_SECONDS", 2.0)

    class EnoughError(BaseException):
        pass

    def stop_when_both_ignore(progress: object) -> None:
        if all((tmp_path / "job" / f"ignores-{rank}").exists() for rank in (0, 1)):
            raise EnoughError

    with pytest.raises(EnoughError):
        run_job(job_module, spec("stubborn", tmp_path), tmp_path / "job", 2, Listener(stop_when_both_ignore))
    assert_gone(tmp_path / "job")


def test_kill_9_of_the_caller_takes_the_whole_tree_along(job_module: str, tmp_path: Path) -> None:
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from diffusion.jobs.specs import JobSpec
        from flows.launcher import Listener, run_job
        spec = JobSpec(run="for-ever", store="x", dataset="0" * 64, shard_copies=Path("."))
        run_job({job_module!r}, spec, Path({str(tmp_path / "job")!r}), 2)
        """
    )
    caller = subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy())
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "job" / "pid-1").exists() or not (tmp_path / "job" / "pid-0").exists():
        assert time.monotonic() < deadline, "the job did not start"
        time.sleep(0.05)
    tree = psutil.Process(caller.pid).children(recursive=True)
    assert len(tree) == 2  # the ranks
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    assert wait_until_ended(tree, time.monotonic() + PATIENCE) == []


def assert_gone(folder: Path) -> None:
    files = list(folder.glob("pid-*"))
    assert files
    for file in files:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Where nobody reaps orphans, as in a container without an init, a dead one stays listed as a zombie.
            status = psutil.Process(int(file.read_text())).status()
            assert status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD), f"{file.name} lives on: {status}"


ASKED = """
import time
from diffusion.jobs.stopping import listen_to_sigterm
asked = listen_to_sigterm()
print("listens", flush=True)
while not asked():
    time.sleep(0.001)
began = time.monotonic()
while time.monotonic() < began + 1:  # a checkpoint, meanwhile
    asked()
print("ends by itself", flush=True)
"""


def test_being_asked_to_end_many_times_at_once_is_being_asked_once() -> None:
    """When a parent of many threads is killed, the kernel asks for each of them."""
    child = subprocess.Popen([sys.executable, "-c", ASKED], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "listens\n"
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=PATIENCE)
    assert (said, child.returncode) == ("ends by itself\n", 0)


LONG = """
import hashlib
from diffusion.jobs import stopping
stopping.STOP_SECONDS = 1
asked = stopping.listen_to_sigterm()
print("listens", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour, in which Python's own code does not run
"""


def test_a_rank_ends_in_time_though_one_operation_takes_longer() -> None:
    """As the backward pass of a large network: nobody may be left of those who could kill the rank."""
    process = subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        time.sleep(0.5)
        process.terminate()
        assert process.wait(PATIENCE) == -signal.SIGALRM
    finally:
        process.kill()
        process.wait()
