"""What the environment decides: where things lie and which servers are used. The one place that reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class InceptionSource(BaseModel):
    """Where the Inception network of FID lies, and which file it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    """Path or https URL of a TorchScript file: bytes [n, 3, height, width] in, `return_features=True` -> [n, 2048]."""
    sha256: str


@dataclass(frozen=True)
class Settings:
    """Where this installation keeps and finds things. None of it can change a weight."""

    home: Path
    """Folder of everything that is made here (`TRAIN_DIFFUSION_HOME`, default `var` in the current folder)."""
    store_uri: str
    """Datasets, checkpoints and evaluations (`TRAIN_DIFFUSION_STORE`: a folder or s3://bucket/prefix)."""
    tracking_uri: str
    """MLflow (`MLFLOW_TRACKING_URI`: an http(s) URL, or sqlite:////absolute/path)."""
    archive: Path | None
    """EuroSAT as a zip or folder (`EUROSAT_ARCHIVE`); None: look in `downloads`, then download."""
    inception: InceptionSource | None
    """The Inception network (`TRAIN_DIFFUSION_INCEPTION`, `TRAIN_DIFFUSION_INCEPTION_SHA256`)."""
    commit: str | None
    """Git commit of the code where it does not lie in a repository (`TRAIN_DIFFUSION_COMMIT`)."""
    s3_block: str | None
    """Name of the Prefect block with the store's credentials (`TRAIN_DIFFUSION_S3_BLOCK`); None: the environment's."""
    deterministic: bool
    """Compute on GPUs by deterministic algorithms alone, slower, so that a resume gives the same bits there too
    (`TRAIN_DIFFUSION_DETERMINISTIC=1`)."""

    @property
    def downloads(self) -> Path:
        """Where downloaded archives lie."""
        return self.home / "downloads"

    @property
    def runs(self) -> Path:
        """Working folders of the runs: job files, journals, logs."""
        return self.home / "runs"

    @property
    def shard_copies(self) -> Path:
        """Local copies of a remote store's shards."""
        return self.home / "shards"

    @property
    def artifacts(self) -> Path:
        """MLflow's artifacts where there is no MLflow server."""
        return self.home / "mlflow" / "artifacts"


def settings() -> Settings:
    """Read the environment."""
    home = Path(os.environ.get("TRAIN_DIFFUSION_HOME", "var")).absolute()
    archive = os.environ.get("EUROSAT_ARCHIVE")
    inception = os.environ.get("TRAIN_DIFFUSION_INCEPTION")
    return Settings(
        home=home,
        store_uri=os.environ.get("TRAIN_DIFFUSION_STORE", str(home / "store")),
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow' / 'mlflow.db'}"),
        archive=Path(archive).expanduser() if archive else None,
        inception=InceptionSource(location=inception, sha256=os.environ.get("TRAIN_DIFFUSION_INCEPTION_SHA256", ""))
        if inception
        else None,
        commit=os.environ.get("TRAIN_DIFFUSION_COMMIT"),
        s3_block=os.environ.get("TRAIN_DIFFUSION_S3_BLOCK"),
        deterministic=os.environ.get("TRAIN_DIFFUSION_DETERMINISTIC", "0") not in ("", "0"),
    )
