"""What a deployed run watches: the worker that began it."""

from __future__ import annotations

import subprocess
import sys


def test_who_started_it_is_known_through_whatever_stands_between() -> None:
    code = "from diffusion.jobs.started import ancestors; import os; print(*ancestors())"
    between = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    first = subprocess.Popen([sys.executable, "-c", between], stdout=subprocess.PIPE, text=True)
    said, _ = first.communicate()
    assert str(first.pid) in said.split()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert str(ended.pid) not in said.split()
