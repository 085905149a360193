"""Feature extractors: which file they are, what they give, and that nothing else is loaded."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.data.sources.eurosat import CLASSES
from diffusion.errors import RecipeError
from diffusion.features import extractor as extractors
from diffusion.features.classifier import Classifier, fuse
from diffusion.features.extractor import load_inception, shipped
from diffusion.features.identity import SHIPPED_SHA256, SHIPPED_WEIGHTS
from diffusion.features.learning import Labelled, tell_views, view, views_told
from diffusion.settings import InceptionSource

CPU = torch.device("cpu")


def test_the_shipped_weights_are_the_ones_that_the_code_names_and_small() -> None:
    data = SHIPPED_WEIGHTS.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHIPPED_SHA256 == shipped(CPU).sha256
    assert len(data) < 3_000_000


@pytest.mark.parametrize("size", [16, 32, 64])
def test_features_do_not_depend_on_the_batch(size: int, random_images) -> None:  # type: ignore[no-untyped-def]
    extractor = shipped(CPU)
    images = random_images(6, size)
    features = extractor.embed(images)
    assert features.shape == (6, 128)
    torch.testing.assert_close(torch.cat([extractor.embed(images[:1]), extractor.embed(images[1:])]), features)


def test_the_extractor_knows_water_from_forest_and_roofs() -> None:
    """Flat patches in the colours that EuroSAT's lakes and forests have, and a lawn of bright roofs."""
    extractor = shipped(CPU)
    rng = np.random.default_rng(0)
    water = np.full((1, 64, 64, 3), (40, 75, 95)) + rng.normal(0, 1, (1, 64, 64, 3))
    forest = np.full((1, 64, 64, 3), (40, 62, 62)) + rng.normal(0, 3, (1, 64, 64, 3))
    roofs = rng.choice([70, 230], (1, 64, 64, 1), p=[0.6, 0.4]) + rng.normal(0, 10, (1, 64, 64, 3))
    images = np.clip(np.concatenate([water, forest, roofs]), 0, 255).astype(np.uint8)
    assert extractor.classify is not None
    found = [CLASSES[label] for label in extractor.classify(extractor.embed(images).numpy())]
    assert found[0] == "SeaLake"
    assert found[1] == "Forest"
    assert found[2] in ("Industrial", "Residential")


def test_fusing_the_batch_norms_changes_nothing() -> None:
    torch.manual_seed(0)
    network = Classifier(3, 10, fused=False)
    for _ in range(3):
        network(torch.randn(8, 3, 64, 64))
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(fuse(network)(x), network.eval()(x), rtol=1e-4, atol=1e-4)


def test_damaged_shipped_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(SHIPPED_WEIGHTS.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "w.safetensors").write_bytes(damaged)
    monkeypatch.setattr(extractors, "SHIPPED_WEIGHTS", tmp_path / "w.safetensors")
    with pytest.raises(RecipeError, match="not the file that it should be"):
        shipped(CPU)


class StandInInception(nn.Module):
    """The calling convention of the published TorchScript file, with a function that is easy to check."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        return images.float().mean(dim=[2, 3]) if return_features else images.float()


@pytest.fixture
def inception_file(tmp_path: Path) -> Path:
    path = tmp_path / "inception.pt"
    torch.jit.script(StandInInception()).save(str(path))
    return path


def test_inception_is_a_torchscript_file_of_a_known_digest(tmp_path: Path, inception_file: Path, random_images) -> None:  # type: ignore[no-untyped-def]
    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    extractor = load_inception(InceptionSource(location=str(inception_file), sha256=sha256), CPU, tmp_path)
    images = random_images(4, 32)
    np.testing.assert_allclose(extractor.embed(images).numpy(), images.mean(axis=(1, 2)), rtol=1e-5)
    assert (extractor.name, extractor.sha256, extractor.classify) == ("inception", sha256, None)


def test_inception_of_another_digest_is_not_loaded(tmp_path: Path, inception_file: Path) -> None:
    with pytest.raises(RecipeError, match="It was not loaded"):
        load_inception(InceptionSource(location=str(inception_file), sha256="0" * 64), CPU, tmp_path)
    with pytest.raises(RecipeError, match="can't be read"):
        load_inception(InceptionSource(location="/no/such/file.pt", sha256="0" * 64), CPU, tmp_path)
    with pytest.raises(RecipeError, match="TRAIN_DIFFUSION_INCEPTION"):
        load_inception(None, CPU, tmp_path)


def test_views_of_one_image_are_drawn_together() -> None:
    """By the closed form where all look alike, ln(2 n - 1); and less where views of one image do."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 16, 16, generator=rng)
    network = Classifier(3, 4, fused=True)
    with torch.no_grad():
        for value in network.head.parameters():
            value.zero_()
        network.head.bias[0] = 1.0
        assert float(tell_views(network, images, torch.zeros(8), rng)) == pytest.approx(math.log(15), abs=1e-5)

    class ByLevel(Classifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            angle = images.mean(dim=(1, 2, 3))
            return torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)

    apart = torch.linspace(-1.5, 1.5, 8)[:, None, None, None].expand(8, 3, 16, 16) * 1.0
    assert float(tell_views(ByLevel(3, 2, fused=True), apart, torch.zeros(8), rng)) < math.log(15) - 0.5
    known = Labelled(np.arange(8, dtype=np.float32), torch.zeros(8), lambda places: 100 * apart[places.astype(int)])
    right, chance = views_told(ByLevel(3, 2, fused=True), known)
    assert chance == 1 / 8
    assert 0 <= right <= 1


def test_a_view_is_of_its_own_image_and_the_right_way_up() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(6, 2, 16, 16, generator=rng)
    other = images.clone()
    other[3] += 1
    first, second = (view(batch, torch.Generator().manual_seed(1)) for batch in (images, other))
    assert [bool((a == b).all()) for a, b in zip(first, second, strict=True)] == [True, True, True, False, True, True]
    rising = (
        torch.linspace(-1, 1, 16)[None, None, :, None].expand(50, 1, 16, 16).contiguous()
    )  # brighter towards its foot
    seen = view(rising, rng)
    assert (seen[:, :, 8:].mean(dim=(1, 2, 3)) > seen[:, :, :8].mean(dim=(1, 2, 3))).all()
