"""What another user of this machine can do, tried as that user: needs root, which can become one."""

from __future__ import annotations

import encodings.idna  # noqa: F401  sockets want it, and another user may not read it where Python lies
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can try it as another user")


def as_another_user(function: Callable[[], Any]) -> Any:
    """Call the function in a process of another user, without any group of ours, and return its result (of JSON's kinds)."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with os.fdopen(into, "w") as file:
                json.dump(function(), file)
            code = 0
        finally:
            os._exit(code)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, "the other user's process failed"
    return json.loads(said)
