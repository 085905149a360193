"""What listens while ranks run, and what another user gets who sends to it.

The ranks of a job used to meet at a server that listened on all interfaces and unpickled what it was sent.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    alone = trainer.train("alone", 16, 1)

    marker = tmp_path / "it ran"
    tmp_path.chmod(0o777)  # so that it could be made
    seen: set[tuple[str, int]] = set()
    rendezvous: set[int] = set()
    sent, done = [0], threading.Event()
    own = listening()

    def attack() -> None:
        hostile = [pickle.dumps(Payload(marker)), b"\x00" * 4096, b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64]
        while not done.is_set():
            with held(own):  # a job of a few steps is over before another user's process has begun
                for path in (tmp_path / "together").glob("rendezvous*"):
                    with contextlib.suppress(FileNotFoundError):
                        rendezvous.add(stat.S_IMODE(path.stat().st_mode))
                new = listening() - own
                seen.update(new)
                for address in new:
                    for message in hostile:
                        sent[0] += as_another_user(lambda a=address, m=message: send(a, m))  # type: ignore[misc]
            time.sleep(0.1)

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        together = trainer.train("together", 16, 2)
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


@contextmanager
def held(own: set[tuple[str, int]]) -> Iterator[None]:
    """Processes that listen at other addresses than these stand still meanwhile; what is sent to them waits for them."""
    stopped = []
    for process in family(psutil.Process()):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid != os.getpid() and listens_at(process) - own:
                process.suspend()
                stopped.append(process)
    try:
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def send(address: tuple[str, int], message: bytes) -> int:
    try:
        with socket.create_connection(address, timeout=1) as connection:
            connection.sendall(message)
            return 1
    except OSError:
        return 0
