"""GPUs are counted as CUDA counts them, and a job that was started for one never trains on CPUs in silence."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffusion.errors import RecipeError
from diffusion.jobs.rank import DEVICE, make_accelerator
from diffusion.training import trainer
from flows.engines import gpus as module
from flows.engines.gpus import gpus
from flows.request import usual_preset

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch can use GPUs here")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver shows a device."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(module, "NVIDIA", str(tmp_path / "nvidia*"))
    monkeypatch.setattr(module, "DEVICES", (str(tmp_path / "nvidia*"),))
    module._asked.cache_clear()
    yield
    module._asked.cache_clear()


def test_a_gpu_that_cuda_can_t_use_is_none_and_that_is_said(
    driver: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with caplog.at_level(logging.WARNING):
        assert gpus() == 0
    assert "has a GPU, and CUDA can't use it (this torch is built without CUDA)" in caplog.text
    assert usual_preset() == "demo", "a choice of who installed it"


def test_one_that_the_user_has_hidden_is_passed_over(
    driver: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == 0
    assert caplog.text == ""


def test_a_rank_whose_gpu_is_gone_does_not_go_on_with_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "cuda")
    with pytest.raises(RuntimeError, match="can't be used any more"):
        make_accelerator()


def test_a_driver_that_does_not_answer_is_not_waited_for(
    driver: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    monkeypatch.setattr(module, "COUNT", "import time; time.sleep(600)")
    assert gpus() == 0
    assert "no answer within 0 s" in caplog.text


def test_where_a_driver_is_broken_no_other_model_is_trained_in_its_place(
    driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "COUNT", "raise SystemExit('CUDA unknown error')")
    with pytest.raises(RecipeError, match=r"GPU that CUDA can't use .CUDA unknown error.*preset=demo"):
        usual_preset()
    module._asked.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usual_preset() == "demo"


def test_what_the_compiler_lacks_is_said_before_it_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer.shutil, "which", lambda name: None)
    monkeypatch.setattr(trainer.sysconfig, "get_path", lambda name: "/no/such")
    assert not trainer._can_compile(torch.device("cuda"))
    assert "lacks a C compiler and Python's headers" in caplog.text
