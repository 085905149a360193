"""Archives with bytes changed, cut and doubled: `python -m tests.security.fuzz_zips 6000`. Each is a DataError, or read."""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from diffusion.data.sources import generated
from diffusion.data.sources.eurosat import read_archive
from diffusion.errors import DataError


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes, most of them in the zip's own records, or cut, or double a piece."""
    changed = bytearray(data)
    signatures = [index for index in range(len(data) - 4) if data[index : index + 2] == b"PK"]
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.choice(signatures) + rng.randrange(60) if rng.random() < 0.8 else rng.randrange(len(data))
        if at < len(changed):
            changed[at] = rng.randrange(256)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    if rng.random() < 0.1:
        at = rng.randrange(len(changed) + 1)
        changed[at:at] = changed[max(0, at - 50) : at]
    return bytes(changed)


def fuzz(archive: Path, folder: Path, count: int, rng: random.Random) -> int:
    """Try so many; returns how many were refused. Raises whatever is no DataError."""
    data, refused = archive.read_bytes(), 0
    for number in range(count):
        path = folder / "mutated.zip"
        path.write_bytes(mutate(data, rng))
        try:
            read_archive(path, "x", "y")
        except DataError:
            refused += 1
        except BaseException:
            kept = folder / f"escaped-{number}.zip"
            kept.write_bytes(path.read_bytes())
            print(f"kept {kept}", file=sys.stderr)
            raise
    return refused


if __name__ == "__main__":
    here = Path(tempfile.mkdtemp(prefix="fuzz-zips-"))
    made = generated.write_archive(here / "small.zip", images_per_class=2)
    total = int(sys.argv[1])
    print(f"{fuzz(made, here, total, random.Random(0))} of {total} were refused, no other error escaped ({here})")
