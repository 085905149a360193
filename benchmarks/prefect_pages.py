"""How fast Prefect's pages are after many nights: 200 flow runs, each with its tasks and artifacts, in a real server and browser.

    python -m benchmarks.prefect_pages [--runs 200]

Makes the flow runs by the server's API in a database of its own (a temporary folder, deleted at the end), as the flow makes
them: 18 task runs, as many progress bars, 6 pictures and a report each; and times how long a browser takes until a page shows
what it is opened for: with all there, and with one. All are of today, which the list of runs has to show: more than it ever will.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from benchmarks.browser import View, print_table, server, time_views

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


def environment(home: Path) -> dict[str, str]:
    """Of a server in that folder."""
    known = {
        key: value for key, value in os.environ.items() if key not in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")
    }
    return known | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_UI_API_URL": API}


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
        shown = ask("/artifacts/", flow_run_id=run, task_run_id=task, key="report", type="markdown", data=report)
        ask(f"/flow_runs/{run}/set_state", state=completed, force=True)
    return run, shown["id"]


def measure(run: str, report: str, newest: str) -> dict[str, float]:
    """Seconds by page."""
    base = API.removesuffix("/api")
    return time_views(
        [
            View("list of runs, shown", f"{base}/runs", newest),
            View("a run's tasks, shown", f"{base}/runs/flow-run/{run}", "report", tab="#task-runs"),
            View("artifacts, shown", f"{base}/artifacts", "samples"),
            View("a report, shown", f"{base}/artifacts/artifact/{report}", newest),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    arguments = parser.parse_args()
    found = {}
    for runs in (1, arguments.runs):
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(PORT)]
        with tempfile.TemporaryDirectory() as folder, server(command, f"{API}/health", environment(Path(folder))):
            run, report = make_runs(runs)
            size = sum(file.stat().st_size for file in Path(folder).glob("prefect.db*"))
            print(f"{runs} runs: {size / 2**20:,.0f} MiB", flush=True)
            found[runs] = measure(run, report, f"night {runs - 1}")
    print_table(found[1], found[arguments.runs], arguments.runs)


if __name__ == "__main__":
    main()
