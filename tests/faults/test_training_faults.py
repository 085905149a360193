"""What may befall a training job by itself: a full disk, a resume of the fast reduction on many processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.jobs.specs import SPEC
from diffusion.training.journal import JOURNAL
from diffusion.training.state import steps_with_checkpoint
from tests.conftest import Ingested, tiny_recipe
from tests.jobs import ONE_THREAD, Trainer, digest

pytestmark = pytest.mark.slow

STEPS, EVERY = 150, 25


def test_fast_reduction_has_the_same_bits_after_a_resume_on_4_processes(
    ingested: Ingested, tmp_path: Path, unique: str
) -> None:
    """DistributedDataParallel would sort its buckets anew after a first step, and a ring of 4 add in another order."""
    trainer = Trainer(ingested, tmp_path, tiny_recipe(reduction="fast", data__lanes=4))
    expected = trainer.train(f"fast-whole-{unique}", 6, processes=4)
    trainer.train(f"fast-resumed-{unique}", 3, processes=4)
    assert trainer.train(f"fast-resumed-{unique}", 6, processes=4) == expected


def limit_files(pid: int, most: int) -> None:
    """What a file may hold that this process writes, as on a disk with that much room."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def test_a_full_disk_is_said_training_goes_on_and_the_next_save_is_tried(
    ingested: Ingested, tmp_path: Path, unique: str
) -> None:
    """For checkpoints; and, later in the same training, so full that the journal takes no line."""
    small = {"network__width": 8, "network__multipliers": [1, 2]}
    recipe = tiny_recipe(data__images=16 * STEPS, data__lanes=1, evaluation__every_images=10**6, **small)
    trainer = Trainer(ingested, tmp_path, recipe)
    expected = trainer.train(f"roomy-{unique}", STEPS, processes=1)
    run = f"full-{unique}"
    where = trainer.folder(run)
    where.mkdir()
    (where / SPEC).write_text(trainer.spec(run, STEPS, every=EVERY).model_dump_json())
    job = subprocess.Popen(
        [sys.executable, "-u", "-m", "diffusion.training.job", str(where)],
        env={**os.environ, **ONE_THREAD, "PYTHONDONTWRITEBYTECODE": "1"},  # it would be cut, too, and stay so
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: limit_files(0, 50_000),
    )
    assert job.stdout is not None
    for said in (b"The checkpoint was not written", b"its records are kept for later"):
        for line in job.stdout:
            if said in line and b"can't be written" in line:
                break
        else:
            raise AssertionError(f"it was not said that {said.decode()}")
        limit_files(job.pid, resource.RLIM_INFINITY if said.startswith(b"its") else 300)
    job.communicate()
    assert job.returncode == 0
    assert digest(trainer.store, run, STEPS) == expected
    assert (where / JOURNAL).read_bytes() == (trainer.folder(f"roomy-{unique}") / JOURNAL).read_bytes()
    assert len(steps_with_checkpoint(trainer.store, run)) == 3, "the saves after the failed one"
