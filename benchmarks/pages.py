"""How fast MLflow's pages are after many nights: 200 runs of 50,000 metric points each, in a real server and a real browser.

    python -m benchmarks.pages [--runs 200] [--points 50000]

Makes the runs in a database of its own (a few GB, in a temporary folder, deleted at the end), starts a server on it, and times what
the pages ask for, and how long a browser takes until the page shows it: with all runs there, and with one.
"""

from __future__ import annotations

import argparse
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
from mlflow.entities import Metric, Param
from playwright.sync_api import sync_playwright

from diffusion.recipe import load_recipe
from diffusion.tracking.connection import connect
from diffusion.tracking.run import RUN_KEY, headline_values, open_experiment
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
REPEATS = 7


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
    params = [Param(key, value) for key, value in headline_values(load_recipe("eurosat")).items()]
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


@contextmanager
def server(database: Path) -> Iterator[None]:
    """An MLflow server on that database."""
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(PORT)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{database}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                requests.get(f"{URL}/health", timeout=2)
                break
            except requests.RequestException:
                time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait()


def median(what: Callable[[], object]) -> float:
    """Median seconds of a few repetitions, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


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
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        for name, address, text in (
            ("runs list, shown", f"{URL}/#/experiments/1/runs", "night"),
            ("run's charts, shown", f"{URL}/#/experiments/1/runs/{run}/model-metrics", "figure_0"),
        ):

            def show(address: str = address, text: str = text) -> None:
                page.goto("about:blank")
                page.goto(address)
                page.get_by_text(text).first.wait_for(timeout=60_000)

            found[name] = median(show)
        browser.close()
    return found


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
            with server(database):
                found[runs] = measure(newest)
    few, many = found.values()
    print(f"\n| s, median of {REPEATS} | 1 run | {arguments.runs} runs | ratio |\n| --- | --- | --- | --- |")
    for name, seconds in few.items():
        print(f"| {name} | {seconds:.2f} | {many[name]:.2f} | {many[name] / seconds:.1f} |")


if __name__ == "__main__":
    main()
