"""Run the demo in a folder of its own and check what came out, as a user would find it: `check_demo.py [FOLDER]`.

With a folder, the demo that was run there is checked.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHORTER = {
    "data.images": 8192,
    "evaluation.every_images": 4096,
    "evaluation.samples": 500,
    "evaluation.likelihood_images": 100,
}
"""A third of what `make demo` trains, of the same network on the same images: all that is checked shows after that."""


def main() -> None:
    source = os.environ.get("CI_SOURCE", "eurosat")
    if len(sys.argv) > 1:
        home = Path(sys.argv[1])
    else:
        home = Path(tempfile.mkdtemp(prefix="train-diffusion-demo-"))
        env = {**os.environ, "TRAIN_DIFFUSION_HOME": str(home)}
        sizes = [word for name, value in SHORTER.items() for word in ("--set", f"{name}={value}")]
        subprocess.run([sys.executable, "-m", "flows.commands.demo", "--source", source, *sizes], check=True, env=env)
    check(home, source)
    print("The demo's run, metrics, images and champion are as they should be.")


def check(home: Path, source: str) -> None:
    """Raises AssertionError for the first thing that is not as it should be."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train-diffusion").experiment_id])
    assert run.info.status == "FINISHED", run.info.status
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    steps = [metric.step for metric in losses]
    assert steps == sorted(set(steps)), "a step is there twice"
    assert len(steps) >= 100, len(steps)
    assert sum(m.value for m in losses[-20:]) < 0.7 * sum(m.value for m in losses[:20]), "the loss did not fall"
    fids = [metric.value for metric in client.get_metric_history(run.info.run_id, "score/fid_eurosat")]
    listed = [item.path for item in client.list_artifacts(run.info.run_id, "images")]
    images = [path for path in listed if "/samples+" in path and path.endswith(".png")]
    assert len(fids) >= 2, fids
    assert len(images) == len(fids) + 1, (images, fids)  # the noise, and a grid a milestone
    if source == "eurosat":  # an untrained network scores above 400, real images 0.7
        assert fids[-1] < fids[0], fids
        assert fids[-1] < 100, fids

    model = f"{run.data.tags['dataset.name'].lower()}-ddpm"
    code = (
        f"import mlflow; m = mlflow.pyfunc.load_model('models:/{model}@champion');"
        "images = m.predict([], params={'n': 2, 'steps': 10, 'label': 'Forest'}); print(images.shape, images.std() > 0)"
    )
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    sampled = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert sampled.stdout.strip() == "(2, 32, 32, 3) True", sampled.stdout


if __name__ == "__main__":
    main()
