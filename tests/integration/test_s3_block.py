"""A store's credentials, kept in a block of a real Prefect server, open a real S3 server."""

import pytest
from pydantic import SecretStr

from diffusion.errors import StoreError
from diffusion.store.objects import check_writable, open_store

pytestmark = pytest.mark.slow


def test_credentials_come_from_a_prefect_block(
    prefect_server: None, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.plugins.credentials import S3Credentials, use_block

    for name in s3:
        monkeypatch.setenv(name, "")  # put back afterwards, whatever the block sets
        monkeypatch.delenv(name)
    S3Credentials(
        access_key_id=s3["AWS_ACCESS_KEY_ID"],
        secret_access_key=SecretStr(s3["AWS_SECRET_ACCESS_KEY"]),
        endpoint_url=s3["AWS_ENDPOINT_URL_S3"],
    ).save("tests-store", overwrite=True)
    use_block(None)
    with pytest.raises(StoreError, match="credentials"):
        check_writable(open_store("s3://tests/block"))
    with pytest.raises(StoreError, match="no block 'train-diffusion-s3/nobody'"):
        use_block("nobody")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of other keys, in the worker's shell")
    use_block("tests-store")
    check_writable(open_store("s3://tests/block"))
