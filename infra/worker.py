"""The worker of a container, as its first process: `python infra/worker.py`, with what the server asks for in its environment.

Tells the server what it must know, then runs a worker. Asked to end, it asks the worker, whose runs leave a checkpoint, and waits for
all of them: what the first process leaves behind is killed without a word.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

FIRST = (
    [sys.executable, "infra/automations.py"],
    ["prefect", "--no-prompt", "deploy", "--all"],
)
READY = Path("/tmp/ready")  # noqa: S108  in a container of its own; its health check looks for it
WORKER = [
    sys.executable,
    "-P",
    "infra/patient_worker.py",
    "worker",
    "start",
    "--pool",
    "train-diffusion",
    "--type",
    "process",
]


def main() -> int:
    """Returns what the worker ended with."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # a first process is not ended by it unless it wants to be
    for command in FIRST:
        if code := subprocess.run(command).returncode:
            return code
    READY.touch()
    worker = subprocess.Popen(WORKER)
    signal.signal(signal.SIGTERM, lambda *_: worker.terminate())
    code = worker.wait()
    while True:
        try:
            os.wait()  # a first process is the parent of all whose own has ended
        except ChildProcessError:
            return code


if __name__ == "__main__":
    sys.exit(main())
