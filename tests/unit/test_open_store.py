"""Where a store is, by what it is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.errors import StoreError
from diffusion.store.objects import open_store


@pytest.mark.parametrize("folder", ["C#", "what?", "100%41", "a b", "tab\there", "ü", "a;b", "a@b"])
def test_a_folder_s_name_means_itself(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "store"
    open_store(str(path)).write("x", b"1")
    assert (path / "x").read_bytes() == b"1"
    assert [entry.name for entry in tmp_path.iterdir()] == [folder]


def test_the_home_is_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_store("~/store").uri == str(tmp_path / "store")


def test_an_address_of_a_file_is_one(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert open_store(f"file:{tmp_path}/a").uri == open_store(f"file://localhost{tmp_path}/a").uri == f"{tmp_path}/a"
    (tmp_path / "a%20b").mkdir()
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a%20b", "where earlier versions have written"


@pytest.mark.parametrize(
    "address",
    ["file:///a?b=c", "file:///a#b", "file://host/a", "ftp://host/a", "s3:/bucket/prefix", "s3:bucket", "http:/x"],
)
def test_an_address_that_is_none_is_no_folder(address: str) -> None:
    with pytest.raises(StoreError, match="neither a folder nor"):
        open_store(address)
