"""Loading a model version whose files are those that its run has made: loading runs the code that lies among them."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffusion.errors import TrackingError, nearest
from diffusion.settings import Settings
from diffusion.tracking.connection import connect
from diffusion.tracking.version_tags import tags_of
from diffusion.trust.redaction import shown

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from mlflow import MlflowClient

FILES_TAG = "files.digest"
"""Of a version, among its lineage: the digest of its files. It lies in MLflow's database, the files lie elsewhere."""
PACKAGE = "diffusion"
ADDED_BY_DOWNLOAD = ("registered_model_meta",)
NAME = re.compile(
    r"(?:models:/)?(?P<model>[A-Za-z0-9_][A-Za-z0-9._-]*)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>[0-9]{1,9}))"
)

log = logging.getLogger(__name__)


def files_digest(folder: Path) -> str:
    """sha256 over the lines `<path> <sha256 of the file>` of a model's files, sorted by path."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in ADDED_BY_DOWNLOAD:
            lines.append(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class OwnCode:
    """The code that a version was made with, in the place of this package's while it runs.

    Both are called `diffusion`: without this a version would run with whichever of the two was imported first, and one of another
    release find functions that are not as it knows them.
    """

    _lock = threading.RLock()

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}
        self._path: list[str] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Whoever imports `diffusion` gets the version's. One version at a time, for all threads."""
        with self._lock:
            before, ours = list(sys.path), _taken_out()
            sys.modules.update(self._modules)
            sys.path[:] = [*self._path, *before]
            try:
                yield
            finally:
                self._modules = _taken_out()
                self._path = [entry for entry in sys.path if entry not in before]
                sys.modules.update(ours)
                sys.path[:] = before


def _taken_out() -> dict[str, ModuleType]:
    """The modules of a package of our name, which are imported no more."""
    names = [name for name in sys.modules if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    return {name: sys.modules.pop(name) for name in names}


class Model:
    """A model version that is known to be what its run has made. Whatever MLflow's own object can do, it can as well."""

    def __init__(self, loaded: Any, code: OwnCode) -> None:
        self._loaded, self._code = loaded, code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> Any:
        """As MLflow's, but a parameter that the model does not have is refused: MLflow leaves it out with a warning.

        Raises TypeError that names the nearest one.
        """
        valid = [param.name for param in self._loaded.metadata.signature.params.params]
        if unknown := sorted(set(params or {}) - set(valid)):
            raise TypeError(f"The model has no parameter '{shown(unknown[0])}': {nearest(unknown[0], valid)}")
        with self._code.in_place():
            return self._loaded.predict(data, params=params)

    def draw(self, n: int = 8, label: str = "", **params: Any) -> list[Image.Image]:
        """n pictures of a class, or of all in turn. Raises what `predict` does.

        Args:
            params: `seed`, `steps`, `sampler`, `guidance`.
        """
        pngs = self.predict([], {"n": n, "label": label, "format": "png", **params})
        return [Image.open(io.BytesIO(base64.b64decode(one))) for one in pngs]


def load_version(name: str, settings: Settings) -> Model:
    """The model of a version, once its files have been found to be its own.

    Args:
        name: `eurosat-ddpm@champion` or `eurosat-ddpm/3`, with or without `models:/`.
        settings: the MLflow server is theirs.

    Raises TrackingError if there is no such version, the server does not answer, or the files are others: none of their code is
    run then. A version that was made before versions carried a digest is loaded with a warning.
    """
    _parse(name)
    if settings.database:
        _check_own(settings.database)
    import mlflow.artifacts
    import mlflow.pyfunc

    version = find_version(connect(settings.tracking_uri), name)
    folder = Path(tempfile.mkdtemp(prefix="train-diffusion-model-"))
    os.chmod(folder, 0o700)
    try:
        mlflow.artifacts.download_artifacts(
            f"models:/{version.name}/{version.version}", dst_path=str(folder), tracking_uri=settings.tracking_uri
        )
        # Whoever loads a model where it lies leaves bytecode there, which is no file of the model's, and would be run in its place.
        for bytecode in [*folder.rglob("__pycache__")]:
            shutil.rmtree(bytecode)
        expected = tags_of(version).get(FILES_TAG)
        if expected is None:
            log.warning(
                "%s %s was made before versions carried a digest: its files are not checked.",
                version.name,
                version.version,
            )
        elif files_digest(folder) != expected:
            raise TrackingError(
                f"The files of {version.name} {version.version} are not those that its run has made: nothing of them was run. "
                "Look who can write where MLflow keeps its artifacts."
            )
        code = OwnCode()
        with code.in_place():
            model = mlflow.pyfunc.load_model(str(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)  # its code is imported from there as it is used
    return Model(model, code)


def _check_own(path: Path) -> None:
    """Raises TrackingError if there is no database where one stands, or it is somebody else's: it says what code a model may run."""
    if not path.exists():
        raise TrackingError(
            f"No MLflow is known here, and there is none at {path}. In the project's folder "
            'eval "$(make env)" says where it is; or set MLFLOW_TRACKING_URI.'
        )
    for one in (path, path.parent):
        if one.stat().st_uid != os.geteuid():
            raise TrackingError(
                f"{one} belongs to another user, who decides what is in it: nothing was loaded from there. Set MLFLOW_TRACKING_URI."
            )


def find_version(client: MlflowClient, name: str) -> ModelVersion:
    """The version of a name, as `load_version` takes it. Raises TrackingError if it names none, or there is none."""
    from mlflow.exceptions import MlflowException

    parts = _parse(name)
    try:
        if parts["alias"]:
            return client.get_model_version_by_alias(parts["model"], parts["alias"])
        return client.get_model_version(parts["model"], parts["version"])
    except MlflowException as error:
        raise TrackingError(f"MLflow has no model version {parts[0]} ({error.error_code}).") from None


def _parse(name: str) -> re.Match[str]:
    parts = NAME.fullmatch(name)
    if parts is None:
        raise TrackingError(
            f"'{shown(name)}' names no model version: it is like eurosat-ddpm@champion or eurosat-ddpm/3."
        )
    return parts
