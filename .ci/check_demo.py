"""Run the demo in a folder of its own and check what came out, as a user would find it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

home = Path(tempfile.mkdtemp(prefix="train-diffusion-demo-"))
os.environ["TRAIN_DIFFUSION_HOME"] = str(home)
source = os.environ.get("CI_SOURCE", "eurosat")
subprocess.run([sys.executable, "-m", "flows.demo", "--source", source], check=True)

from mlflow import MlflowClient  # noqa: E402  after the demo: nothing else is to be imported while it is timed

uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
client = MlflowClient(uri, uri)
(run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
assert run.info.status == "FINISHED", run.info.status
losses = client.get_metric_history(run.info.run_id, "train/loss")
steps = [metric.step for metric in losses]
assert steps == sorted(set(steps)), "a step is there twice"
assert len(steps) >= 100, len(steps)
assert sum(m.value for m in losses[-20:]) < 0.7 * sum(m.value for m in losses[:20]), "the loss did not fall"
fids = client.get_metric_history(run.info.run_id, "score/fid_eurosat")
listed = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
images = [path for path in listed if "/samples+" in path and path.endswith(".png")]
assert len(images) == len(fids) >= 2, (images, fids)
assert fids[-1].value < 0.6 * fids[0].value or source == "generated", [f.value for f in fids]

model = f"{run.data.tags['dataset.name'].lower()}-ddpm"
code = (
    "import mlflow; m = mlflow.pyfunc.load_model('models:/" + model + "@champion');"
    "images = m.predict([], params={'n': 2, 'steps': 10, 'label': 'Forest'}); print(images.shape, images.std())"
)
sampled = subprocess.run(
    [sys.executable, "-c", code],
    env={**os.environ, "MLFLOW_TRACKING_URI": uri},
    check=True,
    capture_output=True,
    text=True,
)
print("the champion samples:", sampled.stdout.strip())
print("1 passed, 0 failed")
