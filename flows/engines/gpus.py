"""The GPUs of this machine, as CUDA itself counts them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache
from glob import glob

log = logging.getLogger(__name__)

NVIDIA = "/dev/nvidia[0-9]*"
DEVICES = (NVIDIA, "/dev/kfd", "/dev/dxg")
"""What drivers show: NVIDIA's, AMD's, and that of WSL."""
BUILT_WITHOUT = "this torch is built without CUDA"
COUNT = f"""
import torch
if not torch.backends.cuda.is_built():
    raise SystemExit("{BUILT_WITHOUT}")
torch.cuda.init()
print(torch.cuda.device_count())
"""
SECONDS = 90.0
"""After which a driver that does not answer is taken for broken."""


def gpus() -> int:
    """How many GPUs a job's processes can use here. Where a driver shows some and none can be used, the reason is logged."""
    return _asked()[0]


def broken_gpu() -> str:
    """Why a GPU of NVIDIA's can't be used by a torch that is built for it, unless the user has hidden it; else empty."""
    why = _asked()[1]
    return why if why != BUILT_WITHOUT and glob(NVIDIA) else ""


@cache
def _asked() -> tuple[int, str]:
    """How many there are; and if none can be used of those that a driver shows, why."""
    if not any(map(glob, DEVICES)):  # torch takes seconds to import
        return 0, ""
    # A process of its own starts CUDA. Before that torch counts what the driver lists: what it is too old for, too, and whole GPUs in
    # place of their parts (MIG).
    try:
        asked = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=SECONDS)
        if asked.returncode == 0:
            return int(asked.stdout), ""
        why = (asked.stderr.strip().splitlines() or [f"code {asked.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        why = f"no answer within {SECONDS:.0f} s"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # the user has hidden it
        return 0, ""
    log.warning("This machine has a GPU, and CUDA can't use it (%s): jobs run on CPUs.", why)
    return 0, why
