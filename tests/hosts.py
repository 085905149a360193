"""Several hosts on one machine: each a network, mount, UTS and process namespace of its own on one bridge. Needs root on Linux.

Their links can be cut, and they can die. They see one file system, but each its own /tmp/ray and /dev/shm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.conftest import BIN, PATIENCE

HERE = "10.77.0.1"
"""This machine, as they see it."""
BRIDGE = "td-bridge"
INIT = """
import os, sys, time
open(sys.argv[1], "w").write("up")
while True:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
    time.sleep(0.1)
"""
BOOT = """
set -e
hostname "$1"; mount --make-rprivate /; mount -t proc proc /proc
# As on Debian, a host's own name means its loopback.
sed "s/^[0-9.]* $1$/127.0.1.1 $1/" "$2/hosts" > "$2/$1/hosts"; mount --bind "$2/$1/hosts" /etc/hosts
mkdir -p /tmp/ray; mount --bind "$2/$1" /tmp/ray; mount -t tmpfs -o size=1g tmpfs /dev/shm
exec "$3" -c "$4" "$2/$1/up"
"""


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    folder: Path
    cut_off: bool = False
    _outer: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def boot(self) -> None:
        """Start it."""
        here = self.folder / self.name
        here.mkdir(exist_ok=True)
        (here / "up").unlink(missing_ok=True)
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", BOOT, "boot"]
        command = ["ip", "netns", "exec", self.name, *unshare, self.name, str(self.folder), sys.executable, INIT]
        self._outer = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        wait_until((here / "up").exists, lambda: f"{self.name} does not start")

    @property
    def _pid(self) -> int:
        assert self._outer is not None
        (init,) = psutil.Process(self._outer.pid).children()
        return init.pid

    def start(self, *command: str, **options: object) -> subprocess.Popen[bytes]:
        """Start a command there."""
        enter = ["nsenter", "-t", str(self._pid), "--mount", "--uts", "--net", "--pid", f"--wd={Path.cwd()}", "--"]
        return subprocess.Popen([*enter, *command], **options)  # type: ignore[call-overload]

    def processes(self, line: str) -> list[psutil.Process]:
        """What runs there with that in its command line."""
        namespace = os.readlink(f"/proc/{self._pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if line in " ".join(process.cmdline()) and os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found.append(process)
        return found

    def die(self) -> None:
        """All its processes at once."""
        assert self._outer is not None
        os.kill(self._pid, signal.SIGKILL)
        self._outer.wait()
        self._outer = None

    def cut(self) -> None:
        """Its link."""
        self.cut_off = True
        sh("ip", "link", "set", f"{self.name}-l", "down")

    def heal(self) -> None:
        """Its link again."""
        self.cut_off = False
        sh("ip", "link", "set", f"{self.name}-l", "up")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._outer is not None


def wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    """Fails with what is the matter by then."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)  # looking costs what the hosts have need of


@contextmanager
def hosts(folder: Path, count: int) -> Iterator[list[Host]]:
    """That many, running. Skips the test where they are not permitted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("several hosts are namespaces, which root on Linux may make")
    if missing := [tool for tool in ("ip", "nsenter", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"several hosts are namespaces, which {' and '.join(missing)} would make")
    made = [Host(f"td-h{number}", f"10.77.0.{10 + number}", folder) for number in range(1, count + 1)]
    sweep(made)  # what a run that was killed has left
    names = "".join(f"{host.address} {host.name}\n" for host in made)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    try:
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network of several hosts can be made here: {error}")
    try:
        sh("ip", "addr", "add", f"{HERE}/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for host in made:
            sh("ip", "netns", "add", host.name)
            sh("ip", "link", "add", f"{host.name}-l", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            sh("ip", "link", "set", f"{host.name}-l", "master", BRIDGE, "up")
            sh("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            sh("ip", "-n", host.name, "link", "set", "eth0", "up")
            sh("ip", "-n", host.name, "link", "set", "lo", "up")
            host.boot()
        yield made
    finally:
        sweep(made)


def sweep(made: list[Host]) -> None:
    """Nothing of them stays."""
    for host in made:
        listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for command in (["netns", "del", host.name], ["link", "del", f"{host.name}-l"]):
            subprocess.run(["ip", *command], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def documented() -> list[str]:
    """The lines of docs/cluster.md that start Ray: on the first host, and on another."""
    page = Path(__file__).parent.parent / "docs" / "cluster.md"
    head, other = [line for line in page.read_text().splitlines() if line.startswith(".venv/bin/ray start")]
    return [head, other]


@dataclass
class Cluster:
    """Ray on these hosts: the first is the head, which computes nothing; each other has one CPU."""

    hosts: list[Host]
    env: dict[str, str]

    @classmethod
    def on(cls, hosts: list[Host]) -> Cluster:
        """Not started yet."""
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
        # A host that is dead is noticed within seconds, where Ray would wait for most of a minute.
        own |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
        own |= {"RAY_health_check_failure_threshold": "3", "RAY_ADDRESS": f"{hosts[0].address}:6379"}
        # It starts its workers as what gives way to all else, which on one machine are the other tests.
        own |= {"RAY_worker_niceness": "0"}
        return cls(hosts, os.environ | own | {"NO_PROXY": "*", "no_proxy": "*"})

    def start(self) -> None:
        """The head, then the others."""
        self.start_head()
        for host in self.hosts[1:]:
            self.join(host)

    def start_head(self) -> None:
        """The head, by the command of docs/cluster.md."""
        self._ray(self.hosts[0], documented()[0], "--num-cpus=0")

    def join(self, host: Host) -> None:
        """Have a host take part, by the other command there."""
        self._ray(host, documented()[1].replace("10.77.0.12", host.address), "--num-cpus=1")

    def _ray(self, host: Host, command: str, *options: str) -> None:
        # None of its files is inherited by what it starts, or its end would not be seen.
        log = (host.folder / host.name / "ray.log").open("wb")
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        files = {"env": env, "stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
        start = (str(BIN / "ray"), *command.split()[1:], *options, "--object-store-memory=100000000")
        for _ in range(3):  # Ray gives up after 30 s by itself: too few on a busy machine
            if host.start(*start, **files).wait(PATIENCE) == 0:
                return
            host.start(str(BIN / "ray"), "stop", "--force", **files).wait(PATIENCE)
        raise AssertionError((host.folder / host.name / "ray.log").read_text()[-2000:])
