"""S3 credentials in a Prefect block, encrypted on the server, for workers whose environment has none.

prefect block register -m flows.plugins.credentials        # once; then fill one in, in the UI or by S3Credentials(...).save("store")
TRAIN_DIFFUSION_S3_BLOCK=store                     # in the worker's environment: use that one
"""

from __future__ import annotations

import os

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from diffusion.errors import StoreError


class S3Credentials(Block):
    """Endpoint and keys of an S3 store, by the names that AWS gives them."""

    _block_type_name = "S3 credentials of train-diffusion"
    _block_type_slug = "train-diffusion-s3"

    access_key_id: str
    secret_access_key: SecretStr
    session_token: SecretStr = Field(default=SecretStr(""), description="Of keys that expire; empty for others.")
    endpoint_url: str = Field(default="", description="Empty for AWS itself.")
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """The variables that boto3 reads."""
        found = {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key.get_secret_value(),
            "AWS_DEFAULT_REGION": self.region,
            "AWS_SESSION_TOKEN": self.session_token.get_secret_value(),  # an empty one is none, and hides another's
        }
        return found | ({"AWS_ENDPOINT_URL_S3": self.endpoint_url} if self.endpoint_url else {})


def use_block(name: str | None) -> None:
    """Put a block's credentials into the environment of this process and of the jobs that it starts; None: do nothing.

    Raises StoreError if there is no such block.
    """
    if name is None:
        return
    try:
        block = S3Credentials.load(name)
    except ValueError as error:
        raise StoreError(
            f"Prefect has no block '{S3Credentials._block_type_slug}/{name}', which TRAIN_DIFFUSION_S3_BLOCK names. Register its "
            "type with `prefect block register -m flows.plugins.credentials` and fill one in."
        ) from error
    assert isinstance(block, S3Credentials)
    os.environ.update(block.environment())
