"""Counter-based random streams: what is drawn depends on (seed, purpose, position) and on nothing else.

No state is carried from draw to draw, so any number of processes, in any order, after any resume, draw the same
numbers. Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is keyed by seed and purpose;
the position is its counter.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

import numpy as np


def stream(seed: int, purpose: str, position: int = 0, step: int = 0) -> np.random.Generator:
    """The generator of one purpose ("noise", "order", …) at one position, and at one step of it where there are several.

    Streams of different arguments never overlap: each has 2**128 draws of its own.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=[0, 0, step, position]))


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
