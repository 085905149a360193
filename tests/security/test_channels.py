"""What listens while ranks run, and what another user gets who sends to it.

The ranks of a job used to meet at a server that listened on all interfaces and unpickled what it was sent.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import stat
import threading
import time
from pathlib import Path

import psutil
import pytest

from diffusion.store.objects import FolderStore
from tests.conftest import Ingested, tiny_recipe
from tests.jobs import Trainer
from tests.processes import family, listens_at
from tests.security.other_user import as_another_user, as_root

LOOPBACK = {"127.0.0.1", "::1"}


class Payload:
    """Code that is run by whoever unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def listening() -> set[tuple[str, int]]:
    """Addresses that this process and its descendants listen at."""
    return {address for process in family(psutil.Process()) for address in listens_at(process)}


@pytest.mark.slow
@as_root
def test_a_job_on_two_ranks_opens_nothing_to_others_and_takes_nothing_from_them(
    ingested: Ingested, tmp_path: Path
) -> None:
    trainer = Trainer(Ingested(FolderStore(tmp_path / "store"), ingested.manifest), tmp_path, tiny_recipe())
    for name in ingested.store.names("datasets/"):
        trainer.store.write(name, ingested.store.read(name))
    alone = trainer.train("alone", 8, 1)

    marker = tmp_path / "it ran"
    tmp_path.chmod(0o777)  # so that it could be made
    seen: set[tuple[str, int]] = set()
    rendezvous: set[int] = set()
    sent, done = [0], threading.Event()
    own = listening()

    def attack() -> None:
        hostile = [pickle.dumps(Payload(marker)), b"\x00" * 4096, b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64]
        while not done.is_set():
            new = listening() - own
            seen.update(new)
            for path in (tmp_path / "together").glob("rendezvous*"):
                with contextlib.suppress(FileNotFoundError):
                    rendezvous.add(stat.S_IMODE(path.stat().st_mode))
            for address in new:
                for message in hostile:
                    sent[0] += as_another_user(lambda a=address, m=message: send(a, m))  # type: ignore[misc]
            time.sleep(0.1)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        together = trainer.train("together", 8, 2)
    finally:
        done.set()
        attacker.join()
    assert seen, "nothing listened: the test does not see what it should"
    assert {address for address, _ in seen} <= LOOPBACK
    assert sent[0] > 0
    assert not marker.exists(), "what another user sent was unpickled"
    assert together == alone
    assert not list((tmp_path / "together").glob("rendezvous*"))
    assert rendezvous, "the ranks met nowhere: the test does not see what it should"
    assert {mode & 0o077 for mode in rendezvous} == {0}, "others can join the ranks"


def send(address: tuple[str, int], message: bytes) -> int:
    try:
        with socket.create_connection(address, timeout=1) as connection:
            connection.sendall(message)
            return 1
    except OSError:
        return 0
