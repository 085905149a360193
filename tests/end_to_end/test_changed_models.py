"""A model version whose files were changed where they lie: none of its code runs when it is loaded by our own function."""

from __future__ import annotations

import base64
import contextlib
import inspect
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from mlflow.exceptions import MlflowException
from PIL import Image

import diffusion
import mlflow
from diffusion.errors import TrackingError
from tests.conftest import PATIENCE, free_port
from tests.processes import family, wait_until_ended
from tests.running import Training
from tests.stack import Project
from tests.typed import blocks

pytestmark = pytest.mark.slow

MODEL = "generated-fields-and-water-ddpm"
CHANGES = {
    "code/diffusion/denoiser.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "sampler.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "code/sitecustomize.py": "import pathlib; pathlib.Path({marker!r}).touch()\n",
    "artifacts/weights.safetensors": "other weights",
}


def test_changed_files_are_refused_before_their_code_runs(
    training: Training, stack: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stack.servers.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    # MLflow's own way leaves bytecode among the files.
    code = (
        f"import os; os.umask(0o077); import mlflow; mlflow.pyfunc.load_model('models:/{MODEL}@champion').predict([])"
    )
    done = stack.shell(sys.executable, "-c", code, folder=tmp_path, env=stack.servers | {"NO_PROXY": "127.0.0.1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((stack.folder / "var/mlflow/artifacts").rglob("__pycache__/*.pyc"))
    loaded = diffusion.load(f"{MODEL}@champion")
    assert loaded.predict([], params={"n": 1, "steps": 1}).shape == (1, 16, 16, 3)

    # A request has a budget in all, not only in each of its numbers, and ends though nobody waits for it any more.
    with pytest.raises(MlflowException, match="50,000 are the most"):
        loaded.predict([], params={"n": 1024, "steps": 1000, "guidance": 3.0})
    limits = inspect.unwrap(type(loaded.unwrap_python_model()).predict).__globals__
    with monkeypatch.context() as patch:
        patch.setitem(limits, "MAX_SECONDS", 0.0)
        with pytest.raises(MlflowException, match="was given up"):
            loaded.predict([], params={"n": 8, "steps": 3})
    assert loaded.predict([], params={"n": 1, "steps": 1}).shape == (1, 16, 16, 3), (
        "a request that was given up blocks others"
    )

    logged = mlflow.MlflowClient().get_model_version(MODEL, "1").source.rpartition("/")[2]
    (folder,) = {path.parent for path in (stack.folder / "var/mlflow/artifacts").rglob(f"{logged}/**/MLmodel")}
    marker = tmp_path / "it ran"
    for name, content in CHANGES.items():
        path = folder / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(content.format(marker=str(marker)))
        with pytest.raises(TrackingError, match="nothing of them was run"):
            diffusion.load(f"{MODEL}/1")
        assert not marker.exists()
        path.unlink() if before is None else path.write_bytes(before)
    diffusion.load(f"models:/{MODEL}/1")


def test_a_model_is_scored_in_another_way_and_beside_another_by_the_words_of_the_page(
    training: Training, stack: Project
) -> None:
    (typed,) = blocks("docs/promotion.md", "Score a model in another way", "")
    another, beside = (
        stack.shell("bash", "-ec", f'eval "$(make env)"\n{line.replace("eurosat-ddpm", MODEL)}')
        for line in typed.strip().splitlines()
    )
    assert another.returncode == 0, another.stderr[-3000:]
    assert "sampling …" in another.stderr
    samples = Path(another.stdout.rpartition("samples: ")[2].strip().removeprefix("file://"))
    assert samples.read_bytes().startswith(b"\x89PNG")
    assert beside.returncode == 0, beside.stderr[-3000:]
    assert f"{MODEL}@champion less {MODEL}/1" in beside.stdout
    assert beside.stdout.count("+0.000 (+0.000 to +0.000): as far as can be told, alike") == 3, beside.stdout
    fids = [line for line in beside.stdout.splitlines() if line.strip().startswith("fid_eurosat") or " fid_own" in line]
    assert len({*fids}) < len(fids), "both are one model"
    wrong = stack.shell(sys.executable, "-m", "flows.commands.score", "no-such-run", "--set", "guidence=2")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "has no checkpoint of a run no-such-run" in wrong.stderr


def test_a_server_of_a_model_answers_and_can_be_ended_while_it_draws_for_somebody_who_has_left(
    training: Training, stack: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in stack.servers.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    port = free_port()
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        f"models:/{MODEL}@champion",
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    env = stack.env | stack.servers | {"NO_PROXY": "127.0.0.1"}
    with (tmp_path / "serve.log").open("wb") as log:
        serving = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    processes: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                break
            time.sleep(0.3)
        processes = family(psutil.Process(serving.pid))
        example = next((stack.folder / "var/mlflow/artifacts").rglob("serving_input_example.json"))
        request = json.loads(example.read_text())
        request["params"] |= {"steps": 2, "label": "River"}
        answer = requests.post(f"http://127.0.0.1:{port}/invocations", json=request, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        served = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in answer.json()["predictions"]]
        loaded = diffusion.load(f"{MODEL}@champion").predict([], params=request["params"] | {"format": "array"})
        assert np.array_equal(np.stack(served), loaded)
        request["params"]["label"] = "Desert"
        refused = requests.post(f"http://127.0.0.1:{port}/invocations", json=request, timeout=PATIENCE)
        assert refused.status_code == 400
        assert "it must be empty or one of AnnualCrop" in refused.text

        asked = json.dumps({"inputs": [], "params": {"n": 96, "steps": 48, "guidance": 1.0}}).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
            client.sendall(head.encode() + asked)
            began = sum(process.cpu_times().user for process in processes)
            while sum(process.cpu_times().user for process in processes) < began + 1:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        assert wait_until_ended(processes, time.monotonic() + PATIENCE) == []
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        serving.kill()
        serving.wait()
