"""How fast Prefect's pages are after many nights: 200 flow runs, each with its tasks and artifacts, in a real server and browser.

    python -m benchmarks.prefect_pages [--runs 200]

Makes the flow runs by the server's API in a database of its own (a temporary folder, deleted at the end), as the flow makes
them: 18 task runs, as many progress bars, 6 pictures and a report each; and times how long a browser takes until a page shows
what it is opened for: with all there, and with one. All are of today, which the list of runs has to show: more than it ever will.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from playwright.sync_api import sync_playwright
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from benchmarks.pages import REPEATS, median

PORT = 5792
API = f"http://127.0.0.1:{PORT}/api"
TASKS = [
    "ingest",
    "measure reference",
    "plan",
    *(f"{verb} step {n}" for n in range(1, 7) for verb in ("train", "evaluate")),
]
TASKS += ["register step 6", "promote version 1", "report"]
PICTURE_BYTES, REPORT_BYTES = 100_000, 130_000


@contextmanager
def server(home: Path) -> Iterator[None]:
    """A Prefect server in that folder."""
    env = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    env["PREFECT_UI_API_URL"] = API
    for known in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        env.pop(known, None)
    command = [
        str(Path(sys.executable).parent / "prefect"),
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(PORT),
    ]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                if requests.get(f"{API}/health", timeout=2).ok:
                    break
            except requests.RequestException:
                time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait()


def make_runs(runs: int) -> tuple[str, str]:
    """Nights, the newest last; returns the ids of the newest flow run and of its report."""
    session = requests.Session()
    # SQLite takes one writer at a time, and the server's own services write as well.
    again = Retry(total=10, backoff_factor=0.2, status_forcelist=[503], allowed_methods=None)
    session.mount(API, HTTPAdapter(max_retries=again))

    def ask(path: str, **body: Any) -> dict[str, Any]:
        answer = session.post(f"{API}{path}", json=body, timeout=60)
        answer.raise_for_status()
        return dict(answer.json())

    flow = ask("/flows/", name="train-diffusion")["id"]
    picture = "data:image/webp;base64," + "A" * PICTURE_BYTES
    running, completed = {"type": "RUNNING"}, {"type": "COMPLETED"}
    for number in range(runs):
        run = ask("/flow_runs/", flow_id=flow, name=f"night {number}", state=running, tags=["auto-scheduled"])["id"]
        for name in TASKS:
            task = ask("/task_runs/", flow_run_id=run, task_key=name, dynamic_key="0", name=name, state=running)["id"]
            ask(f"/task_runs/{task}/set_state", state=completed, force=True)
            key = name.replace(" ", "-")
            ask("/artifacts/", flow_run_id=run, task_run_id=task, key=key, type="progress", data=100.0)
            if name.startswith("evaluate"):
                ask("/artifacts/", flow_run_id=run, task_run_id=task, key="samples", type="image", data=picture)
        report = f"# night {number}\n\n<!-- {'A' * REPORT_BYTES} -->"
        artifact = ask("/artifacts/", flow_run_id=run, task_run_id=task, key="report", type="markdown", data=report)[
            "id"
        ]
        ask(f"/flow_runs/{run}/set_state", state=completed, force=True)
    return run, artifact


def measure(run: str, report: str, newest: str) -> dict[str, float]:
    """Seconds by page."""
    base = API.removesuffix("/api")
    found = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        for name, address, tab, text in (
            ("list of runs, shown", f"{base}/runs", "", newest),
            ("a run's tasks, shown", f"{base}/runs/flow-run/{run}", "#task-runs", "report"),
            ("artifacts, shown", f"{base}/artifacts", "", "samples"),
            ("a report, shown", f"{base}/artifacts/artifact/{report}", "", newest),
        ):

            def show(address: str = address, tab: str = tab, text: str = text) -> None:
                page.goto("about:blank")
                page.goto(address)
                if tab:
                    page.locator(tab).click(timeout=60_000)
                page.get_by_text(text).first.wait_for(timeout=60_000)

            found[name] = median(show)
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    found = {}
    for runs in (1, arguments.runs):
        with tempfile.TemporaryDirectory() as folder, server(Path(folder)):
            run, report = make_runs(runs)
            size = sum(file.stat().st_size for file in Path(folder).glob("prefect.db*"))
            print(f"{runs} runs: {size / 2**20:,.0f} MiB", flush=True)
            found[runs] = measure(run, report, f"night {runs - 1}")
    few, many = found.values()
    print(f"\n| s, median of {REPEATS} | 1 run | {arguments.runs} runs | ratio |\n| --- | --- | --- | --- |")
    for name, seconds in few.items():
        print(f"| {name} | {seconds:.2f} | {many[name]:.2f} | {many[name] / seconds:.1f} |")


if __name__ == "__main__":
    main()
