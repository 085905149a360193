"""What the environment decides: where things lie and which servers are used. The one place that reads it.

python -m diffusion.settings    prints every setting: its value, whether it was set, and what it means (`make settings`)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from diffusion.errors import SettingsError, nearest
from diffusion.trust.redaction import redacted, shown

PREFIX = "TRAIN_DIFFUSION_"
DATABASE = Path("mlflow", "mlflow.db")
"""MLflow's, in the home."""
LOOPBACK = ("127.0.0.1", "localhost")
OF_TESTS = ("TRAIN_DIFFUSION_TEST_INSTALL",)
SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_AUTH_STRING",
    "RAY_AUTH_TOKEN",
)
"""What other programs read and this one passes on; `make settings` says whether they are there."""


class InceptionSource(BaseModel):
    """Where the Inception network of FID lies, and which file it must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    """Path or https URL of a TorchScript file: bytes [n, 3, height, width] in, `return_features=True` -> [n, 2048]."""
    sha256: str


class Settings(BaseSettings):
    """Where this installation keeps and finds things. None of it can change a weight."""

    model_config = SettingsConfigDict(
        case_sensitive=True,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    home: Path = Field(default=Path("var"), validation_alias="TRAIN_DIFFUSION_HOME")
    """Folder of everything that is made here."""
    store_uri: str = Field(default="", validation_alias="TRAIN_DIFFUSION_STORE")
    """Datasets, checkpoints and evaluations: a folder or s3://bucket/prefix. Default: store in the home."""
    tracking_uri: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    """MLflow: an http(s) URL, or sqlite:////absolute/path. Default: a database in the home."""
    tracking_pages: str = Field(default="", validation_alias="TRAIN_DIFFUSION_MLFLOW_UI")
    """http(s) URL at which people open MLflow, where that is not MLFLOW_TRACKING_URI: in containers, behind a proxy."""
    flow_pages: str = Field(default="", validation_alias="TRAIN_DIFFUSION_PREFECT_UI")
    """http(s) URL at which people open Prefect's server of make up, where a proxy stands before it."""
    archive: Path | None = Field(default=None, validation_alias="EUROSAT_ARCHIVE")
    """EuroSAT as a zip or folder. Default: look in the home's downloads, then download."""
    inception_location: str | None = Field(default=None, validation_alias="TRAIN_DIFFUSION_INCEPTION")
    """The Inception network, where a recipe asks for it: path or https URL of a TorchScript file."""
    inception_sha256: str = Field(default="", validation_alias="TRAIN_DIFFUSION_INCEPTION_SHA256")
    """The digest that this file must have."""
    commit: str | None = Field(default=None, validation_alias="TRAIN_DIFFUSION_COMMIT")
    """Git commit of the code where it does not lie in a repository."""
    s3_block: str | None = Field(default=None, validation_alias="TRAIN_DIFFUSION_S3_BLOCK")
    """Name of the Prefect block with the store's credentials. Default: those of the environment."""
    notify: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="TRAIN_DIFFUSION_NOTIFY")
    """Prefect's notification blocks that are told of failures, nights left out and promotions: type/name, commas between; or none."""
    project: Path | None = Field(default=None, validation_alias="TRAIN_DIFFUSION_PROJECT")
    """Folder of prefect.yaml, where flow runs start. Set by make up and in the containers."""
    deterministic: bool = Field(default=False, validation_alias="TRAIN_DIFFUSION_DETERMINISTIC")
    """Compute on GPUs by deterministic algorithms alone, slower, so that a resume gives the same bits there too."""

    engine: Literal["local", "ray"] = Field(default="local", validation_alias="TRAIN_DIFFUSION_ENGINE")
    """Where jobs run: local, as processes of this machine; ray, on the Ray cluster that RAY_ADDRESS names."""

    prefect_port: int = Field(default=4200, ge=1, le=65535, validation_alias="PREFECT_PORT")
    """Where the Prefect server of make up listens."""
    mlflow_port: int = Field(default=5000, ge=1, le=65535, validation_alias="MLFLOW_PORT")
    """Where the MLflow server of make up listens."""
    ray_port: int = Field(default=6379, ge=1, le=65535, validation_alias="RAY_PORT")
    """Where Ray listens that make up ENGINE=ray starts."""
    auth: Literal["on", "off"] = Field(default="on", validation_alias="AUTH")
    """off: the servers of make up ask for no password."""

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("archive", mode="after")
    @classmethod
    def _of_the_user(cls, archive: Path | None) -> Path | None:
        return archive.expanduser() if archive else None

    @field_validator("tracking_pages", "flow_pages", mode="after")
    @classmethod
    def _for_everybody(cls, address: str) -> str:
        parts = urlsplit(address)
        if "@" in parts.netloc:
            raise ValueError("it has a user or password in its address, which pages would show: people log in there")
        if address and (parts.scheme not in ("http", "https") or not parts.netloc):
            raise ValueError("it is no address like http://127.0.0.1:5000")
        return address

    @field_validator("notify", mode="before")
    @classmethod
    def _split(cls, blocks: Any) -> Any:
        return (
            tuple(filter(None, (block.strip() for block in blocks.split(",")))) if isinstance(blocks, str) else blocks
        )

    @model_validator(mode="before")
    @classmethod
    def _lies_in_the_home(cls, values: dict[str, Any]) -> dict[str, Any]:
        home = cls._absolute(Path(values.get("TRAIN_DIFFUSION_HOME", "var")))
        defaults = {
            "TRAIN_DIFFUSION_STORE": str(home / "store"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{home / DATABASE}",
        }
        return defaults | values

    @property
    def database(self) -> Path | None:
        """MLflow's database in the home, if nothing else is named."""
        path = self.home / DATABASE
        return path if self.tracking_uri == f"sqlite:///{path}" else None

    @property
    def inception(self) -> InceptionSource | None:
        """The Inception network, if one is named."""
        if self.inception_location is None:
            return None
        return InceptionSource(location=self.inception_location, sha256=self.inception_sha256)

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


def reach_loopback_directly() -> None:
    """From now on this process and its children ask no proxy for what runs on this machine: HTTP_PROXY is for the world outside."""
    told = {name: os.environ[name] for name in ("no_proxy", "NO_PROXY") if os.environ.get(name)}
    names = [name.strip() for value in told.values() for name in value.split(",") if name.strip()]
    if "*" not in names:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*names, *LOOPBACK]))


def settings() -> Settings:
    """Read the environment. Raises SettingsError for a variable of ours that is misspelt or has a value that it can't have."""
    known = [*_variables(), *OF_TESTS]
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name not in known:
            raise SettingsError(f"There is no setting {shown(name)}: {nearest(name, list(_variables()))}")
    try:
        return Settings()
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in error.errors()]
        said = [f"{where}: {what}" if where else what for where, what in found]
        allowed = (
            " It is true or false, 1 or 0, yes or no."
            if any(e["type"].startswith("bool") for e in error.errors())
            else ""
        )
        raise SettingsError(f"The environment can't be used: {'; '.join(said)}.{allowed}") from None


def _variables() -> dict[str, str]:
    """The field of each variable."""
    return {str(field.validation_alias): name for name, field in Settings.model_fields.items()}


def main() -> int:
    """Print them all."""
    try:
        found = settings()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for variable, name in _variables().items():
        value = getattr(found, name)
        text = ", ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        origin = "set" if os.environ.get(variable) else "default"
        print(
            f"{variable}\n    {origin + ':':9}{redacted(text) or '(none)'}\n    {Settings.model_fields[name].description}"
        )
    for variable in SECRETS:
        print(f"{variable}\n    {'set:     ***' if os.environ.get(variable) else 'not set'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
