"""Who owns a run, and when it is known to be dead."""

import json
import subprocess
import sys

import psutil
import pytest

from flows.owner import Owner, is_dead, read_owner, this_process


def changed(**values: object) -> Owner:
    return Owner.model_validate(json.loads(this_process()) | values)


def test_this_process_lives() -> None:
    assert not is_dead(changed())


def test_a_process_that_has_ended_is_dead_also_as_a_zombie() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = changed(pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert not is_dead(owner)
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert is_dead(owner), "as a zombie"
    child.wait()
    assert is_dead(owner), "reaped"


def test_another_process_under_the_same_number_is_not_the_owner() -> None:
    assert is_dead(changed(started=json.loads(this_process())["started"] - 3600))


def test_nothing_outlives_a_reboot() -> None:
    assert is_dead(changed(boot="another boot"))


def test_a_process_of_another_machine_is_never_known_to_be_dead() -> None:
    assert not is_dead(changed(host="elsewhere", pid=1, boot="another boot"))


@pytest.mark.parametrize(
    "tag", ["", "{}", "no JSON", "[" * 100_000, '{"host": 1}', '{"host":"h","boot":"b","pid":-1,"started":0}']
)
def test_a_tag_that_names_no_process_is_nobody_s(tag: str) -> None:
    assert read_owner(tag) is None
