"""Have systemd keep what `make up` starts: `python infra/service.py install | remove | keep`.

install writes a unit of the user's systemd (of the machine's, for root), enables and starts it. keep is what it runs: `make up`, and
what of it ends without having been stopped is started again. The settings of the shell that installs it go along, in a private file.
Without systemd, whatever starts programs with the machine can run keep.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import kept
import lifecycle
import processes
import psutil
import stack

from diffusion.trust.private import read_private, use_private_home

UNIT = "train-diffusion.service"
REFUSED = 78
"""How keep ends where no later try would go better: systemd leaves it at that."""
LOOK_SECONDS = 2.0
SURE_SECONDS = 3.0
"""After which what has ended, and is still on the list, was not stopped by `make down`."""
SLOWEST_SECONDS = 60.0
"""Between two starts of what ends at once again and again."""
WELL_SECONDS = 120.0
"""After which a start has gone well."""

PAGE = """[Unit]
Description=train-diffusion: Prefect server, MLflow server and worker of {project}
After=network-online.target

[Service]
Type=exec
Environment={home}
ExecStart={python} {service} keep
ExecStop={python} {stack} down
# What it keeps lives on without it, a training too, and its next start takes it over.
KillMode=process
Restart=on-failure
RestartPreventExitStatus={refused}
RestartSec=5
TimeoutStopSec=180

[Install]
WantedBy={target}
"""
BY_HAND = "Without it, have what starts programs with the machine run this: {python} {service} keep"


def scope() -> tuple[Path, list[str]]:
    """The folder of units and the command of the manager: root's are the machine's, everybody else's their own."""
    if os.geteuid() == 0:
        return Path("/etc/systemd/system"), ["systemctl"]
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "systemd" / "user", ["systemctl", "--user"]


def quoted(path: Path | str) -> str:
    """A word of a unit's command line."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'


def page() -> str:
    """The unit."""
    here = Path(__file__).resolve()
    return PAGE.format(
        project=str(processes.PROJECT).replace("%", "%%"),
        home=quoted(f"TRAIN_DIFFUSION_HOME={processes.HOME}"),
        python=quoted(sys.executable),
        service=quoted(here),
        stack=quoted(here.with_name("stack.py")),
        refused=REFUSED,
        target="multi-user.target" if os.geteuid() == 0 else "default.target",
    )


def install() -> None:
    """Write the unit, enable it and start it with the settings of this shell."""
    folder, manager = scope()
    unit = folder / UNIT
    if unit.exists() and f"of {processes.PROJECT}\n".replace("%", "%%") not in unit.read_text(encoding="utf-8"):
        raise SystemExit(f"{unit} keeps another copy of this project. Remove it there first: make no-service")
    lifecycle.refuse_under_a_run("make service", "what it runs on starts anew")
    use_private_home(processes.HOME)
    processes.STACK.mkdir(parents=True, exist_ok=True)
    kept.refuse_to_begin_empty()
    if os.environ.get("EMPTY") == "1":
        kept.ELSEWHERE.unlink(missing_ok=True)  # what is kept starts without that word
    kept.keep_settings()
    folder.mkdir(parents=True, exist_ok=True)
    unit.write_text(page(), encoding="utf-8")
    print(f"written: {unit}")
    for verb in (["daemon-reload"], ["enable", UNIT], ["restart", UNIT]):
        told = manage([*manager, *verb])
        if told is not None:
            by_hand = BY_HAND.format(
                python=shlex.quote(sys.executable), service=shlex.quote(str(Path(__file__).resolve()))
            )
            raise SystemExit(f"systemd can't be asked here: {told}\n{by_hand}")
    journal = shlex.join(["journalctl", *manager[1:], "-u", UNIT])
    print(f"systemd keeps it all running from now on. What it says: {journal}. To end that: make no-service")
    if os.geteuid() != 0 and manage(["loginctl", "enable-linger"]) is not None:
        print("It starts when you log in. To have it start with the machine: sudo loginctl enable-linger $USER")


def manage(command: list[str]) -> str | None:
    """Run a command of systemd; returns why it failed, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"{shlex.join(command)} failed")


def remove() -> None:
    """Stop it all, and have nothing start it again."""
    folder, manager = scope()
    lifecycle.refuse_under_a_run("make no-service", "it is stopped with the rest")
    told = manage([*manager, "disable", "--now", UNIT])
    (folder / UNIT).unlink(missing_ok=True)
    kept.SETTINGS.unlink(missing_ok=True)
    if told is None:
        manage([*manager, "daemon-reload"])
    else:
        lifecycle.down()
    print("Nothing starts by itself any more.")


class Kept:
    """What of the stack has been seen to run, and how it is started again."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, list[str], dict[str, str]]] = {}
        self.started: dict[str, float] = {}
        self.wait: dict[str, float] = {}

    def look(self, name: str) -> None:
        """Take note of what runs; start what has ended and was not stopped."""
        process, now = processes.find(name), time.monotonic()
        if process is not None:
            if self.seen.get(name, (0,))[0] != process.pid:
                try:
                    self.seen[name] = process.pid, process.cmdline(), process.environ()
                except (
                    psutil.NoSuchProcess
                ):  # it has just ended: the next look finds that out, if it knows how it is started
                    if name not in self.seen:
                        raise
            if now - self.started.get(name, now) > WELL_SECONDS:
                self.wait.pop(name, None)
            return
        pid_file = processes.STACK / f"{name}.pid"
        if name not in self.seen or not pid_file.exists():
            return
        time.sleep(SURE_SECONDS)
        if not pid_file.exists() or processes.find(name) is not None:
            return
        wait = self.wait.get(name, 0.0)
        if now - self.started.get(name, -SLOWEST_SECONDS) < wait:
            return
        _, command, env = self.seen[name]
        with processes.alone(wait=False) as alone:
            if not alone or not pid_file.exists():
                return  # somebody is about to start or stop it
            print(f"{name} has ended: it is started again", flush=True)
            processes.start(name, command, env)
        self.started[name], self.wait[name] = time.monotonic(), min(SLOWEST_SECONDS, 2 * wait or LOOK_SECONDS)


def keep() -> None:
    """Bring all of it up, and start again what ends, until SIGTERM. What runs is left running: `make down` stops it."""
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    wanted = json.loads(read_private(kept.SETTINGS)) if kept.SETTINGS.exists() else {}
    os.environ |= wanted
    try:
        kept.refuse_to_begin_empty()
    except SystemExit as refusal:
        print(refusal, file=sys.stderr)
        raise SystemExit(REFUSED) from None
    begun = subprocess.run([sys.executable, str(Path(stack.__file__)), "up"])
    if begun.returncode != 0:
        raise SystemExit(begun.returncode)
    keeper = Kept()
    while not asked:
        for name in reversed(lifecycle.NAMES):
            keeper.look(name)
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    stack.obey({"install": install, "remove": remove, "keep": keep}, __doc__)
