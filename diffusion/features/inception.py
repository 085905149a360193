"""The file of the Inception network: read where the user says that it is, or fetched once. No torch in here."""

from __future__ import annotations

import hashlib
from pathlib import Path

from diffusion.data.sources.download import download
from diffusion.errors import DataError, RecipeError
from diffusion.settings import InceptionSource
from diffusion.store.copies import LocalCopy, StoreDamage
from diffusion.trust.reading import read_file

MAX_BYTES = 512 << 20
"""The network has 95 MB."""


class Web:
    """Files by their addresses, for a `LocalCopy`."""

    uri = "the web"

    def read(self, name: str) -> bytes:
        """The content of an https address. Raises StoreError if it can't be had now, DataError if it is too large."""
        return download(name, MAX_BYTES)


def read_inception(source: InceptionSource, copies: Path) -> bytes:
    """The file's content. Raises RecipeError if it is not the one that is meant, StoreError if its server does not answer.

    Args:
        copies: folder where what was fetched is kept for the next process.
    """
    try:
        if source.location.startswith("https://"):
            return LocalCopy(Web(), copies).read(source.location, source.sha256)
        content = read_file(Path(source.location), MAX_BYTES)
    except StoreDamage as error:
        raise RecipeError(f"The extractor {source.location} {error}. It was not loaded.") from error
    except DataError as error:
        raise RecipeError(f"The extractor is not to be had: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise RecipeError(
            f"The extractor {source.location} is not the file that it should be: its sha256 is {found}, expected {source.sha256}. "
            "It was not loaded."
        )
    return content
