"""Scores: what becomes of them in MLflow, and what an older form of them counts as."""

import json
import math
from pathlib import Path

import pytest

from diffusion.errors import DataError
from diffusion.evaluation.figures import metrics
from diffusion.evaluation.job import check_finite
from diffusion.evaluation.scores import find_scores
from diffusion.presentation.legend import METRICS, legend
from diffusion.store import layout
from diffusion.store.objects import FolderStore
from diffusion.tracking.sender import journal_rows, timing_rows
from tests.scores import made


def test_every_metric_has_its_meaning_in_the_legend() -> None:
    record = {"step": 1, "kind": "metrics", "loss": 1.0, "learning_rate": 1.0, "gradient_norm": 1.0}
    earlier = {"step": 1, "images_per_second": 1.0, "data_wait_share": 0.0, "peak_memory_bytes": 1}
    timing = earlier | {"model_flops_utilisation": 0.5}
    assert {*timing_rows(timing)} - {*timing_rows(earlier)} == {("speed/model_flops_utilisation", 0.5, 1)}
    logged = {name for name, *_ in (*journal_rows(record), *timing_rows(timing))}
    scored = {name.removesuffix("_eurosat") for name in metrics(made())}
    beside = {name for name in scored if name.endswith(("_error", "_floor"))}
    assert {name.replace("score_detail/", "score/").rpartition("_")[0] for name in beside} < scored
    known = {f"{section}/{name}" for section, known in METRICS.items() for name in known if section != "system"}
    assert logged | scored - beside | {"score_detail/…_error", "score_detail/…_floor"} == known
    assert all(f"| {name} | " in legend() for name in known)


def test_what_could_not_be_read_again_is_not_written() -> None:
    """JSON has no NaN: an evaluation would be made again and again, and nobody would know why."""
    scores = made()
    check_finite(scores)
    rows = tuple(
        row.model_copy(update={"value": math.nan if row.figure == "kid" else row.value}) for row in scores.rows
    )
    with pytest.raises(DataError, match="step 1 these figures came out as no finite numbers: kid"):
        check_finite(scores.model_copy(update={"rows": rows}))


def test_scores_of_an_older_form_are_made_anew(tmp_path: Path) -> None:
    store, scores = FolderStore(tmp_path), made()
    where = layout.scores("run", 1)
    store.write(where, scores.model_dump_json().encode())
    assert find_scores(store, "run", 1, 1000) == scores
    assert find_scores(store, "run", 1, 750) is None, "of another number of samples"
    older = {key: value for key, value in json.loads(scores.model_dump_json()).items() if key != "evidence_sha256"}
    store.write(where, json.dumps(older).encode())
    assert find_scores(store, "run", 1, 1000) is None
