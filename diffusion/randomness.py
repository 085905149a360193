"""Counter-based random streams: what is drawn depends on (seed, purpose, position) and on nothing else.

No state is carried from draw to draw, so any number of processes, in any order, after any resume, draw the same
numbers. Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is keyed by seed and purpose;
the position is its counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray


def stream(seed: int, purpose: str, position: int = 0, step: int = 0) -> np.random.Generator:
    """The generator of one purpose ("noise", "order", …) at one position, and at one step of it where there are several.

    Streams of different arguments never overlap: each has 2**128 draws of its own.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=[0, 0, step, position]))


def normals(
    seed: int, purpose: str, positions: Iterable[int], step: int, shape: Sequence[int], dtype: Any = np.float32
) -> NDArray[Any]:
    """Standard normal numbers, [positions, *shape]: those of each position from a stream of its own."""
    return np.stack([stream(seed, purpose, position, step).standard_normal(shape, dtype) for position in positions])


@lru_cache(maxsize=256)
def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
