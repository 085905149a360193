"""JSON documents that carry a checksum of their own: a changed byte is found when they are read."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from pydantic import BaseModel

from diffusion.trust.reading import parse_json

CHECKSUM = "checksum"

T = TypeVar("T", bound=BaseModel)


def seal(document: BaseModel) -> bytes:
    """The document as JSON, with its checksum; equal documents have equal bytes."""
    fields = document.model_dump(mode="json")
    return (json.dumps({**fields, CHECKSUM: checksum(fields)}, indent=1) + "\n").encode()


def unseal(kind: type[T], data: bytes) -> T:
    """The document. Raises ValueError (pydantic's ValidationError is one) if it is not as it was sealed."""
    fields = parse_json(data)
    if not isinstance(fields, dict) or fields.pop(CHECKSUM, None) != checksum(fields):
        raise ValueError("its checksum is not its own")
    return kind.model_validate(fields)


def is_sealed(data: bytes) -> bool:
    """Whether a document has a checksum at all. Raises ValueError if it is no JSON."""
    fields = parse_json(data)
    return isinstance(fields, dict) and CHECKSUM in fields


def checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
