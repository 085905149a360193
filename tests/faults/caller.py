"""What the flow does around a training job, as a process of its own that can be killed: `python -m tests.faults.caller FOLDER`."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path

from diffusion.data.manifest import require_dataset
from diffusion.jobs.specs import TrainingJob
from diffusion.store.objects import open_store
from diffusion.tracking import connection
from diffusion.tracking.connection import connect
from diffusion.tracking.experiment import open_experiment
from diffusion.tracking.run import Lineage, TrackedRun
from diffusion.tracking.sender import MetricsSender
from flows.engines.placement import Placement
from flows.engines.ray_cluster import run_on_cluster
from flows.launcher import Listener, run_job


def main(folder: Path) -> None:
    told = json.loads((folder / "caller.json").read_text())
    job = TrainingJob.model_validate(told["job"])
    manifest = require_dataset(open_store(job.store), job.dataset)
    lineage = Lineage(key=job.run, name=job.run, commit="c" * 40, flow_run_id=job.run, flow_run_url="", owner="{}")
    connection.ANSWER_SECONDS = 60  # as in conftest.py
    client = connect(told["tracking_uri"])
    run = TrackedRun.open(client, open_experiment(client, None), lineage, job.recipe, manifest, job.store)
    (folder / "mlflow_run").write_text(run.run_id)
    with MetricsSender(run, folder) as sender:
        if "counts" in told:  # of processes, on a cluster
            placement = Placement(module="diffusion.training.job", counts=told["counts"], threads=1)
            run_on_cluster(placement, job, folder, Listener(on_line=partial(print, flush=True)))
        else:
            run_job("diffusion.training.job", job, folder, told["processes"], threads=1)
        sender.flush()
    run.close("FINISHED")


if __name__ == "__main__":
    # As a flow is cancelled: its job is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(Path(sys.argv[1]))
