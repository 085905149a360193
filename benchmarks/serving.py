"""What a model version costs to serve: cold start, and the latency of a request for 8 images in 20 steps.

    python -m benchmarks.serving models:/eurosat-ddpm@champion

MLFLOW_TRACKING_URI says where the model is. The server is `mlflow models serve --env-manager local`, on the loopback interface.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import requests

PORT = 5793
REQUEST = {"inputs": [], "params": {"n": 8, "steps": 20, "seed": 0, "format": "png"}}
REPEATS = 9


def main() -> None:
    bin_folder = Path(sys.executable).parent
    command = [str(bin_folder / "mlflow"), "models", "serve", "-m", sys.argv[1], "--env-manager", "local"]
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "-p", str(PORT)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not _answers():
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}.")
            time.sleep(0.05)
        print(f"cold start: {time.perf_counter() - began:.1f} s until it answers")
        seconds = [_ask() for _ in range(REPEATS + 1)]
        print(f"first request: {seconds[0]:.2f} s; then {statistics.median(seconds[1:]):.2f} s (median of {REPEATS})")
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


def _answers() -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{PORT}/ping", timeout=5).status_code == 200
    except requests.RequestException:
        return False


def _ask() -> float:
    began = time.perf_counter()
    requests.post(f"http://127.0.0.1:{PORT}/invocations", json=REQUEST, timeout=600).raise_for_status()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
