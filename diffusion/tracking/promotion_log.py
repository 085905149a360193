"""The log of promotions in the store: an entry an object, which says what went live, in place of what, and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import StringConstraints, TypeAdapter

from diffusion.data.sealed import CHECKSUM, checksum
from diffusion.errors import DataError
from diffusion.store import layout
from diffusion.store.objects import Store
from diffusion.tracking.gates import Gate
from diffusion.trust.reading import parse_json

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Number = Annotated[str, StringConstraints(pattern="^[0-9]{1,9}$")]


@dataclass(frozen=True)
class Promotion:
    """An entry of the log."""

    before: Number | None
    """The version that was champion; `from` in the file."""
    to: Number
    reason: str = ""
    gates: tuple[Gate, ...] = ()
    run_id: str | None = None
    """The MLflow run of `to`: numbers begin again where a model is deleted, or MLflow moves. Earlier versions wrote none."""

    def is_of(self, version: ModelVersion) -> bool:
        """Whether it made this version champion."""
        if self.run_id is None and self.reason:
            return self.to == str(version.version) and version.tags.get("decision") == self.reason
        return self.to == str(version.version) and self.run_id in (None, version.run_id)

    def to_bytes(self) -> bytes:
        """As it lies in the store."""
        fields: dict[str, Any] = {
            "from": self.before,
            "to": self.to,
            "reason": self.reason,
            "gates": [asdict(g) for g in self.gates],
        }
        fields |= {"run_id": self.run_id} if self.run_id else {}
        return json.dumps({**fields, CHECKSUM: checksum(fields)}, indent=1).encode()


def read_log(store: Store, model: str) -> list[Promotion]:
    """All entries of a model's log; read one by one, since a listing may lag."""
    entries: list[Promotion] = []
    while True:
        try:
            entries.append(_read_entry(store, layout.promotion(model, len(entries))))
        except KeyError:
            return entries


def _read_entry(store: Store, name: str) -> Promotion:
    """Raises KeyError if there is none, DataError if it can't be read: without it nobody knows what was live."""
    try:
        fields = parse_json(store.read(name))
        if CHECKSUM in fields and fields.pop(CHECKSUM) != checksum(fields):  # earlier versions wrote none
            raise ValueError("its checksum is not its own")
        return TypeAdapter(Promotion).validate_python({**fields, "before": fields.pop("from")})
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, KeyError) and error.args != ("from",):
            raise
        raise DataError(f"The promotion {store.uri}/{name} can't be read. Restore it from a backup.") from error


def past_champions(store: Store, count: int) -> dict[str, list[str]]:
    """The last `count` versions that were champion, by model, the newest last."""
    found: dict[str, dict[str, None]] = {}
    for name in store.names(layout.PROMOTIONS):
        if name.endswith(".json"):
            entry, versions = _read_entry(store, name), found.setdefault(name.split("/")[1], {})
            for version in filter(None, (entry.before, entry.to)):  # one made champion by hand is a `from` only
                versions.pop(version, None)
                versions[version] = None
    return {model: list(versions)[-count:] if count else [] for model, versions in found.items()}


def is_applied(store: Store, model: str, number: int) -> bool:
    """Whether the alias was moved as this entry says."""
    try:
        store.read(layout.promotion_applied(model, number))
    except KeyError:
        return False
    return True
