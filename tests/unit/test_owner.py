"""Who owns a run, and when it is known to be dead."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusion.errors import RunBusy
from diffusion.jobs.lock import LOCK, lock_folder
from diffusion.jobs.started import started
from flows.deployed import be_the_only_run
from flows.owner import (
    FLOW_FOLDER,
    OWNER,
    Owner,
    has_left,
    is_dead,
    read_owner,
    sees_the_folder_of,
    signs_of_life,
    this_process,
)
from tests.conftest import PATIENCE


def changed(**values: object) -> Owner:
    return Owner.model_validate(json.loads(this_process()) | values)


def test_this_process_lives() -> None:
    assert not is_dead(changed())


def test_a_process_that_has_ended_is_dead_also_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = changed(pid=child.pid, started=started(child.pid))
    assert not is_dead(owner)
    assert not is_dead(changed(pid=child.pid, started=psutil.Process(child.pid).create_time())), "as it was noted once"
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert is_dead(owner), "as a zombie"
    child.wait()
    assert is_dead(owner), "reaped"


def test_of_two_deployed_runs_on_one_machine_the_second_is_told_of_the_first(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from flows.deployed import be_the_only_run; "
    hold += "be_the_only_run(Path(sys.argv[1]), '1127-0200-nightly', '1'); print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(RunBusy, match="1127-0200-nightly is under way here"):
        be_the_only_run(tmp_path, "retried", "2", seconds=0)
    first.kill()
    first.wait()
    be_the_only_run(tmp_path, "retried", "2")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the clock is all there is")
def test_whoever_sets_the_clock_makes_no_process_another(monkeypatch: pytest.MonkeyPatch) -> None:
    owner, created = changed(), psutil.Process().create_time()
    later = psutil.boot_time() + 3600
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: later)
    assert psutil.Process().create_time() > created + 3000, "which is counted from the clock"
    assert not is_dead(owner)


def test_another_process_under_the_same_number_is_not_the_owner() -> None:
    assert is_dead(changed(started=json.loads(this_process())["started"] - 3600))


@pytest.mark.parametrize("other", [{"machine": "of a clone with this host's name"}, {"space": "pid:[1]"}])
def test_what_only_has_this_host_s_name_is_never_known_to_be_dead(other: dict[str, str]) -> None:
    """Clones of a machine, and containers with its name: the number of one's process is another's, or nobody's, here."""
    assert not is_dead(changed(**other, started=0))
    assert is_dead(changed(space="pid:[1]", boot="another boot")), "whatever container it was in"


def test_where_machines_have_no_id_another_boot_may_be_another_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.owner.machine_id", lambda: "")
    assert not is_dead(changed(machine="", boot="another boot"))
    assert not is_dead(changed(machine=""))
    assert is_dead(changed(machine="", started=0.0))


@pytest.mark.parametrize("error", [psutil.AccessDenied(1), PermissionError()])
def test_whoever_may_not_be_looked_at_is_not_dead(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> psutil.Process:
        raise error

    monkeypatch.setattr(psutil, "Process", refuse)
    assert not is_dead(changed())


def test_as_earlier_versions_wrote_it_an_owner_is_still_known() -> None:
    known = {key: value for key, value in json.loads(this_process()).items() if key not in ("machine", "space")}
    owner = read_owner(json.dumps(known))
    assert owner is not None
    assert not is_dead(owner)
    assert is_dead(owner.model_copy(update={"started": 0.0}))


def test_of_another_container_of_this_machine_the_lock_tells(tmp_path: Path) -> None:
    """A worker's container is started again: it has to go on at once, not in four minutes."""
    other = changed(space="pid:[1]")
    lock = lock_folder(tmp_path / FLOW_FOLDER)
    assert not has_left(other, tmp_path)
    lock.close()
    assert has_left(other, tmp_path)
    assert not has_left(changed(space="pid:[1]", machine="another"), tmp_path), "written to just now"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run something as another user")
def test_a_process_that_may_not_be_looked_at_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid, and an owner of another user."""
    owner = changed(pid=1)
    monkeypatch.setattr(psutil.Process, "__init__", lambda self, pid: (_ for _ in ()).throw(psutil.NoSuchProcess(pid)))
    assert is_dead(changed(pid=2**30)), "nobody has that number"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            os.write(write, b"dead" if is_dead(owner) else b"alive")
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"alive"


def test_nothing_outlives_a_reboot() -> None:
    assert is_dead(changed(boot="another boot"))


def test_a_process_of_another_machine_is_never_known_to_be_dead() -> None:
    assert not is_dead(changed(host="elsewhere", pid=1, boot="another boot"))


@pytest.mark.parametrize(
    "tag", ["", "{}", "no JSON", "[" * 100_000, '{"host": 1}', '{"host":"h","boot":"b","pid":-1,"started":0}']
)
def test_a_tag_that_names_no_process_is_nobody_s(tag: str) -> None:
    assert read_owner(tag) is None


def test_a_run_that_writes_nothing_for_long_is_seen_to_live_by_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks are known to one machine alone, only what is written tells."""
    monkeypatch.setattr("flows.owner.SIGN_SECONDS", 0.05)
    lock_folder(tmp_path / FLOW_FOLDER).close()
    lock = tmp_path / FLOW_FOLDER / LOCK
    os.utime(lock, (time.time() - 600,) * 2)
    elsewhere = changed(host="another")
    assert has_left(elsewhere, tmp_path)
    assert sees_the_folder_of(elsewhere, tmp_path), "as an earlier version left it"
    with signs_of_life(tmp_path):
        deadline = time.monotonic() + PATIENCE
        while time.time() - lock.stat().st_mtime > 300:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not has_left(elsewhere, tmp_path)
    assert {path.name for path in lock.parent.iterdir()} == {LOCK, OWNER}, "nothing of the question is left"
    assert sees_the_folder_of(changed(), tmp_path)
    assert not sees_the_folder_of(elsewhere, tmp_path), "what this machine left here says nothing of another's process"
