"""The source archive: what is accepted, and how each kind of bad input is refused."""

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion.data.sources import eurosat, find
from diffusion.data.sources.eurosat import CLASSES, MAX_FILE_BYTES, read_archive, read_eurosat
from diffusion.data.sources.find import read_source
from diffusion.data.sources.source import SourceOptions, content_digest
from diffusion.errors import DataError


def rewrite(archive: Path, target: Path, change: Callable[[str], str | None], top: str = "2750") -> Path:
    """A copy of the archive with members renamed (or dropped) and another top folder."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            changed = change(name)
            if changed is not None:
                new.writestr(changed.replace("2750", top), old.read(name))
    return target


def test_the_digest_is_the_same_for_every_container(archive: Path, tmp_path: Path) -> None:
    expected = read_archive(archive, "x", "y").digest
    other_zip = rewrite(archive, tmp_path / "other.zip", lambda name: name, top="EuroSAT_RGB")
    assert read_archive(other_zip, "x", "y").digest == expected
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    assert read_archive(tmp_path / "unpacked", "x", "y").digest == expected
    assert read_archive(tmp_path / "unpacked" / "2750", "x", "y").digest == expected


def test_the_digest_is_the_documented_one(archive: Path) -> None:
    images = read_archive(archive, "x", "y").images
    lines = [f"{i.class_name}/{i.file_name} {hashlib.sha256(i.read()).hexdigest()}\n" for i in images]
    assert content_digest(images) == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No archive at .*EUROSAT_ARCHIVE"):
        read_archive(tmp_path / "nothing.zip", "x", "y")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_zip(archive: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.zip"
    data = archive.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="not a whole zip"):
        read_archive(cut, "x", "y")


def test_a_flipped_byte_inside_the_zip(archive: Path, tmp_path: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[len(data) // 3] ^= 0xFF
    (tmp_path / "flipped.zip").write_bytes(data)
    with pytest.raises(DataError):
        read_archive(tmp_path / "flipped.zip", "x", "y")


@pytest.mark.parametrize(
    "name", ["../outside.jpg", "2750/Forest/../../../outside.jpg", "/etc/outside.jpg", "..\\outside.jpg"]
)
def test_a_path_outside_the_folder(archive: Path, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.zip"
    bad.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(bad, "a") as file:
        file.writestr(name, b"x")
    with pytest.raises(DataError, match="outside its folder"):
        read_archive(bad, "x", "y")


def test_a_member_without_a_name(archive: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("2750/Forest/Forest_1.jpg", b"x")
    name = b"2750/Forest/Forest_1.jpg"
    bad.write_bytes(bad.read_bytes().replace(name, b"\0" + name[1:]))  # the library ends a name at the first zero
    with pytest.raises(DataError, match="a member without a name"):
        read_archive(bad, "x", "y")


def test_an_absurd_expansion(archive: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    bomb.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("2750/Forest/Forest_999999.jpg", bytes(MAX_FILE_BYTES + 1))
    with pytest.raises(DataError, match="has more than 1,048,576 bytes"):
        read_archive(bomb, "x", "y")


def test_a_class_is_missing(archive: Path, tmp_path: Path) -> None:
    without = rewrite(archive, tmp_path / "w.zip", lambda name: None if "Forest" in name else name)
    with pytest.raises(DataError, match="no images of the class Forest"):
        read_archive(without, "x", "y")


def test_other_content_than_eurosat(archive: Path) -> None:
    with pytest.raises(DataError, match=r"holds other images: 120 images .* expected 27,000"):
        read_eurosat(archive)


def test_eurosat_is_known_by_its_content_and_with_one_image_exchanged_is_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_archive(archive, "x", "y")
    for module in (eurosat, find):
        monkeypatch.setattr(module, "EUROSAT_DIGEST", whole.digest)
        monkeypatch.setattr(module, "EUROSAT_IMAGES", len(whole.images))
    for name in ("eurosat", str(archive)):
        assert read_source(name, archive).name == "EuroSAT"
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    first, second, *_ = sorted((tmp_path / "2750" / "Forest").iterdir())
    first.write_bytes(second.read_bytes()[:-2] + b"\0\xff\xd9")
    for name in ("eurosat", str(tmp_path / "2750")):
        with pytest.raises(
            DataError, match=r"holds other images.*digest (is )?[0-9a-f]{16}.*Get the (RGB )?archive again"
        ):
            read_source(name, tmp_path / "2750")
    assert read_source(str(tmp_path / "2750"), tmp_path / "2750", SourceOptions(name="mine")).name == "mine"


def test_an_image_twice(archive: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.zip"
    twice.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(twice, "a") as file:
        file.writestr("EuroSAT_RGB/Forest/Forest_1.jpg", b"x")
    with pytest.raises(DataError, match="twice"):
        read_archive(twice, "x", "y")


def test_files_that_are_no_images_are_left_out(archive: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra.zip"
    extra.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(extra, "a") as file:
        for name in ("2750/readme.txt", "__MACOSX/2750/Forest/._Forest_1.jpg", "2750/Forest/Thumbs.db"):
            file.writestr(name, b"x")
    assert read_archive(extra, "x", "y").digest == read_archive(archive, "x", "y").digest


def test_every_class_is_drawn(archive: Path) -> None:
    images = read_archive(archive, "x", "y").images
    assert {image.class_name for image in images} == set(CLASSES)
    assert len({image.read() for image in images}) == len(images)
    assert all(image.read()[:2] == b"\xff\xd8" for image in images)
