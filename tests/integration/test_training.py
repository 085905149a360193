"""The training job: one process or several, killed and resumed, must end with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data.ingest import ingest
from diffusion.data.sealed import unseal
from diffusion.data.sources.find import read_source
from diffusion.errors import RecipeError, RunBusy, TrainingDiverged
from diffusion.evaluation.scores import Scores
from diffusion.jobs.lock import lock_folder
from diffusion.jobs.specs import SPEC, EvaluationJob, ReferenceJob
from diffusion.recipe_files import fit_to_dataset
from diffusion.store.objects import FolderStore
from diffusion.training.checkpoint import load_checkpoint
from diffusion.training.journal import records
from diffusion.training.state import steps_with_checkpoint
from flows.launcher import LOOPBACK
from tests.conftest import PATIENCE, Ingested, tiny_recipe
from tests.jobs import Trainer, start
from tests.ranks import fork

pytestmark = pytest.mark.slow

EVERYTHING: dict[str, Any] = {
    "objective__loss": "hybrid",
    "objective__noise_levels": "importance",
    "process__steps": 20,
    "data__quarter_turns": 0.5,
    "ema__half_lives": (50, 500),
}


ALIGNED: dict[str, Any] = {"objective__alignment": 0.5, "evaluation__extractors": ["own", "eurosat"]}


@pytest.mark.parametrize("options", [{"network__dropout": 0.1}, EVERYTHING | ALIGNED])
def test_exact_reduction_gives_the_same_bits_on_1_2_and_4_processes_and_across_a_resume(
    ingested: Ingested, tmp_path: Path, unique: str, options: dict[str, Any]
) -> None:
    trainer = Trainer(ingested, tmp_path, tiny_recipe(**options, data__lanes=4))
    expected = trainer.train(f"one-{unique}", 8, processes=1)
    assert trainer.train(f"two-{unique}", 8, processes=2) == expected
    trainer.train(f"mixed-{unique}", 3, processes=4)
    assert trainer.train(f"mixed-{unique}", 8, processes=1) == expected
    journals = {(tmp_path / f"{name}-{unique}" / "journal.jsonl").read_bytes() for name in ("one", "two", "mixed")}
    assert len(journals) == 1
    assert [record["step"] for record in records(journals.pop())] == list(range(1, 9))


def test_shared_out_matrices_are_what_each_process_would_have_made_alone(tmp_path: Path) -> None:
    """Also where there are fewer of them than processes."""
    (tmp_path / "log").touch()
    env = {**os.environ, "WORLD_SIZE": "3", "GLOO_SOCKET_IFNAME": LOOPBACK}
    ranks = [fork("tests.sharing", tmp_path, tmp_path / "log", env | {"RANK": str(rank)}) for rank in range(3)]
    assert [rank.wait(PATIENCE) for rank in ranks] == [0, 0, 0], (tmp_path / "log").read_text()


@pytest.mark.parametrize(("bands", "dtype"), [(1, "float32"), (13, "uint16")])
def test_other_bands_and_levels_are_trained_to_the_same_bits_on_1_and_2_processes(
    tmp_path: Path, unique: str, bands: int, dtype: str
) -> None:
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for number in range(40):
        np.save(images / f"{number}.npy", rng.integers(0, 3000, (16, 16, bands)).astype(dtype))
    store = FolderStore(tmp_path / "store")
    manifest = ingest(read_source(str(images), images), store, shard_bytes=60_000)
    assert (len(manifest.images.bands), manifest.images.dtype) == (bands, dtype)
    recipe = fit_to_dataset(tiny_recipe(data__lanes=4), {}, manifest.images)
    trainer = Trainer(Ingested(store, manifest), tmp_path, recipe)
    assert trainer.train(f"one-{unique}", 4, processes=1) == trainer.train(f"two-{unique}", 4, processes=2)


def test_fast_reduction_gives_the_same_training_to_rounding(ingested: Ingested, tmp_path: Path, unique: str) -> None:
    sizes = {"data__images": 480, "data__lanes": 4, "evaluation__every_images": 480}
    recipe = tiny_recipe(reduction="fast", **sizes, **ALIGNED)
    trainer = Trainer(ingested, tmp_path, recipe)
    losses, weights = {}, {}
    for processes in (1, 4):
        run = f"fast{processes}-{unique}"
        trainer.train(run, 30, processes)
        losses[processes] = [record["loss"] for record in records((tmp_path / run / "journal.jsonl").read_bytes())]
        loaded = load_checkpoint(trainer.store, run, 30)[1].model
        weights[processes] = torch.cat([loaded[name].flatten() for name in sorted(loaded)])
    assert len(losses[1]) == 30
    # Rounding grows with the steps: it starts at a float32's and stays below these bounds.
    assert losses[1][:20] == pytest.approx(losses[4][:20], rel=1e-4)
    assert losses[1] == pytest.approx(losses[4], rel=0.02)
    assert float((weights[1] - weights[4]).norm() / weights[1].norm()) < 0.02


def test_checkpoints_at_milestones_stay_and_of_the_others_the_last_two(
    ingested: Ingested, tmp_path: Path, unique: str
) -> None:
    trainer = Trainer(ingested, tmp_path, tiny_recipe())
    assert trainer.recipe.milestones == (8, 16)
    run = f"kept-{unique}"
    start(trainer.folder(run), trainer.spec(run, 16, every=2), "diffusion.training.job", 1)
    assert steps_with_checkpoint(trainer.store, run) == [8, 12, 14, 16]
    assert len(trainer.store.names(f"checkpoints/{run}/")) == 4 * 5, "parts of dropped checkpoints are left"


def test_a_second_writer_of_a_run_is_refused_and_takes_over_when_the_first_has_ended(tmp_path: Path) -> None:
    where = tmp_path / "busy"
    where.mkdir()
    with lock_folder(where):
        with pytest.raises(RunBusy, match=f"Process {os.getpid()} on this machine is writing"):
            lock_folder(where, seconds=0.2)
        code = "from pathlib import Path; from diffusion.jobs.lock import lock_folder; lock_folder(Path({!r}), {})"
        refused = subprocess.run([sys.executable, "-c", code.format(str(where), 0.5)], capture_output=True, text=True)
        assert "RunBusy" in refused.stderr
        waiting = subprocess.Popen([sys.executable, "-c", code.format(str(where), 60)])
        time.sleep(1)
        assert waiting.poll() is None
    assert waiting.wait(PATIENCE) == 0, "it takes over when the first has ended"


def test_asked_to_end_it_leaves_a_checkpoint_where_it_is(ingested: Ingested, tmp_path: Path, unique: str) -> None:
    trainer = Trainer(ingested, tmp_path, tiny_recipe(data__images=160_000))
    run = f"asked-{unique}"
    where = trainer.folder(run)
    where.mkdir()
    (where / SPEC).write_text(trainer.spec(run, 10_000, every=10_000).model_dump_json())
    job = subprocess.Popen([sys.executable, "-m", "diffusion.training.job", str(where)], stdout=subprocess.PIPE)
    assert job.stdout is not None
    for line in job.stdout:  # the first line of progress: it trains
        if line.startswith(b"[rank 0] step "):
            break
    job.send_signal(signal.SIGTERM)
    job.communicate()
    steps = steps_with_checkpoint(trainer.store, run)
    assert len(steps) == 1
    assert 0 < steps[0] < 10_000
    # The journal ends where the checkpoint is, at the end of a record's stretch.
    assert records((where / "journal.jsonl").read_bytes())[-1]["step"] == steps[0]


def test_divergence_stops_the_run_with_step_rate_and_advice(ingested: Ingested, tmp_path: Path, unique: str) -> None:
    recipe = tiny_recipe(optimizer__learning_rate=1e30, optimizer__warmup_images=0)
    trainer = Trainer(ingested, tmp_path, recipe)
    with pytest.raises(TrainingDiverged, match=r"at step \d+, with learning rate .*Lower optimizer\.learning_rate"):
        trainer.train(f"nan-{unique}", 16, processes=2)
    assert steps_with_checkpoint(trainer.store, f"nan-{unique}") == []


def test_a_run_can_t_be_continued_with_another_recipe(ingested: Ingested, tmp_path: Path, unique: str) -> None:
    Trainer(ingested, tmp_path, tiny_recipe()).train(f"other-{unique}", 2, processes=1)
    with pytest.raises(RecipeError, match="another recipe"):
        Trainer(ingested, tmp_path, tiny_recipe(ema__ramp=0.1)).train(f"other-{unique}", 4, processes=1)


@pytest.mark.parametrize(
    "preset",
    [
        {},
        {"network__kind": "seed", "network__class_conditional": False, "data__lanes": 1},
        # All is trained after 2 steps: one of the averages is chosen.
        {**EVERYTHING, "data__images": 32, "evaluation__choice_samples": 40, "evaluation__guidance": 1.5},
    ],
)
def test_evaluation_gives_the_same_scores_and_grid_on_1_and_2_processes(
    ingested: Ingested, tmp_path: Path, unique: str, preset: dict[str, Any]
) -> None:
    run = f"evaluated-{unique}"
    trainer = Trainer(ingested, tmp_path, tiny_recipe(**preset, evaluation__samples=90))
    trainer.train(run, 2, processes=1)
    reference = ReferenceJob(**trainer.common(run), image_size=16, extractor="eurosat")
    start(tmp_path / "reference", reference, "diffusion.evaluation.measure_reference", 2)
    results = []
    for processes in (1, 2):
        spec = EvaluationJob(**trainer.common(run), step=2)
        start(tmp_path / f"evaluation{processes}", spec, "diffusion.evaluation.job", processes)
        where = f"runs/{run}/evaluations/{2:09d}"
        results.append([trainer.store.read(f"{where}/{name}") for name in ("scores.json", "grid.png", "closest.png")])
    assert results[0] == results[1]
    scores = unseal(Scores, results[0][0])
    if trainer.recipe.total_steps == 2:
        assert set(scores.fid_by_weights) == {"ema-50", "ema-500"}
        assert scores.weights == min(scores.fid_by_weights, key=lambda name: scores.fid_by_weights[name])
    else:
        assert scores.weights == "ema-500000"
