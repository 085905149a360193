"""Names that become paths or queries, as validated types: whoever reads one from a tag, a file or a parameter asks here."""

from __future__ import annotations

from typing import Annotated

from pydantic import StringConstraints, TypeAdapter

from diffusion.errors import StoreError
from diffusion.trust.redaction import shown

# No leading dot or dash, no slash: never a path of its own, nor an option.
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$"

RunName = Annotated[str, StringConstraints(pattern=_NAME)]
"""Key of a run: one folder in the store, and one on the machine that runs it."""
ObjectName = Annotated[str, StringConstraints(pattern=_NAME)]
"""Last part of an object's name in the store: a shard, a file of a checkpoint."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""A digest."""
LONGEST_NAME = 1024

_RUN_NAME = TypeAdapter[str](RunName)


def run_name(text: object) -> RunName:
    """What somebody else calls a run, if it can be one's key. Raises ValueError if it can't."""
    return _RUN_NAME.validate_python(text)


def check_object_path(name: str) -> str:
    """The name of an object, or the beginning of one, if it stays within its store. Raises StoreError if it does not."""
    beginning = name.endswith("/") or name == ""
    if not is_object_path(f"{name}x" if beginning else name):
        raise StoreError(f"'{shown(name)}' is no name of an object in a store: it was not used.")
    return name


def is_object_path(name: str) -> bool:
    """Whether an object in a store of ours can have this name: what others put there may have any."""
    inside = not any(part in ("", ".", "..") for part in name.split("/"))
    return inside and name.isprintable() and "\\" not in name and len(name) <= LONGEST_NAME
