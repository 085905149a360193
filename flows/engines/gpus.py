"""The GPUs of this machine, as CUDA itself counts them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache
from glob import glob

log = logging.getLogger(__name__)

DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""What drivers show: NVIDIA's, AMD's, and that of WSL."""
COUNT = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"
SECONDS = 90.0
"""After which a driver that does not answer is taken for broken."""


@cache
def gpus() -> int:
    """How many GPUs a job's processes can use here. Where a driver shows some and none can be used, the reason is logged."""
    if not any(map(glob, DEVICES)):  # torch takes seconds to import
        return 0
    # A process of its own starts CUDA. Before that torch counts what the driver lists: what it is too old for, too, and whole GPUs in
    # place of their parts (MIG).
    try:
        asked = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, timeout=SECONDS)
        if asked.returncode == 0:
            return int(asked.stdout)
        why = (asked.stderr.strip().splitlines() or [f"code {asked.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        why = f"no answer within {SECONDS:.0f} s"
    if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        log.warning("This machine has a GPU, and CUDA can't use it (%s): jobs run on CPUs.", why)
    return 0
