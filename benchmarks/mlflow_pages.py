"""How fast MLflow's pages are after many nights: 200 runs of 50,000 metric points each, in a real server and a real browser.

    python -m benchmarks.mlflow_pages [--runs 200] [--points 50000]

Makes the runs in a database of its own (a few GB, in a temporary folder, deleted at the end), starts a server on it, and times what
the pages ask for, and how long a browser takes until the page shows it: with all runs there, and with one.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
from pathlib import Path

import requests
from mlflow.entities import Metric, Param

from benchmarks.browser import View, median, print_table, server, time_views
from diffusion.recipe import flatten
from diffusion.recipe_files import load_recipe
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import open_experiment
from diffusion.tracking.run import RUN_KEY
from mlflow import MlflowClient

PORT = 5791
URL = f"http://127.0.0.1:{PORT}"
SERIES = (
    "train/loss",
    "train/learning_rate",
    "train/gradient_norm",
    "speed/images_per_second",
    "speed/data_wait_share",
)


def make_runs(database: Path, runs: int, points: int) -> str:
    """One run by MLflow's client, as the flow makes it, and copies of its rows; returns the newest one's id."""
    client = connect(f"sqlite:///{database}")
    experiment_id = open_experiment(client, database.parent / "artifacts")
    first = _first_run(client, experiment_id).info.run_id
    with sqlite3.connect(database) as rows:
        rows.execute("pragma synchronous = off")
        for number in range(runs):
            run = f"{number:032x}"
            for table in ("runs", "tags", "params", "latest_metrics"):
                _copy(rows, table, first, run, number)
            each = points // len(SERIES)
            start = 1_790_000_000_000 + number * 86_400_000
            for key in SERIES:
                values = ((key, 1 / (step + 1), start + step, run, step, 0) for step in range(each))
                rows.executemany(
                    "insert into metrics (key, value, timestamp, run_uuid, step, is_nan) values (?, ?, ?, ?, ?, ?)",
                    values,
                )
            rows.commit()
    rows.close()
    return run


def _first_run(client: MlflowClient, experiment_id: str):  # type: ignore[no-untyped-def]
    run = client.create_run(experiment_id, run_name="night", tags={RUN_KEY: "night"})
    scores = [f"score/figure_{n}" for n in range(8)] + [f"score_detail/figure_{n}" for n in range(10)]
    metrics = [Metric(key, 1.0, 1, 1) for key in (*SERIES, *scores)]
    params = [Param(key, value) for key, value in flatten(load_recipe("eurosat")).items()]
    client.log_batch(run.info.run_id, metrics=metrics, params=params)
    client.set_terminated(run.info.run_id)
    return run


def _copy(rows: sqlite3.Connection, table: str, source: str, run: str, number: int) -> None:
    columns = [column[1] for column in rows.execute(f"pragma table_info({table})")]
    changed = {"run_uuid": f"'{run}'", "name": f"'night {number}'", "start_time": f"start_time + {number}"}
    taken = ", ".join(
        changed.get(column, column) if table == "runs" or column == "run_uuid" else column for column in columns
    )
    statement = f"insert into {table} ({', '.join(columns)}) select {taken} from {table} where run_uuid = ?"  # noqa: S608
    rows.execute(statement, (source,))


def measure(run: str) -> dict[str, float]:
    """Seconds by what is asked for."""
    api = f"{URL}/api/2.0/mlflow"

    def search() -> None:
        body = {"experiment_ids": ["1"], "max_results": 100, "order_by": ["attributes.start_time DESC"]}
        requests.post(f"{api}/runs/search", json=body, timeout=60).raise_for_status()

    def chart() -> None:
        query = f"run_ids={run}&metric_key=train/loss&max_results=320"
        address = f"{URL}/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval?{query}"
        requests.get(address, timeout=60).raise_for_status()

    found = {"list of runs (API)": median(search), "one chart's points (API)": median(chart)}
    return found | time_views(
        [
            View("runs list, shown", f"{URL}/#/experiments/1/runs", "night"),
            View("run's charts, shown", f"{URL}/#/experiments/1/runs/{run}/model-metrics", "figure_0"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--points", type=int, default=50_000)
    arguments = parser.parse_args()
    found = {}
    for runs in (1, arguments.runs):
        with tempfile.TemporaryDirectory() as folder:
            database = Path(folder, "mlflow.db")
            newest = make_runs(database, runs, arguments.points)
            print(f"{runs} runs: {database.stat().st_size / 2**20:,.0f} MiB", flush=True)
            command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
            with server([*command, "--backend-store-uri", f"sqlite:///{database}"], f"{URL}/health"):
                found[runs] = measure(newest)
    print_table(found[1], found[arguments.runs], arguments.runs)


if __name__ == "__main__":
    main()
