"""Cores: what a container or a unit is granted counts, whatever the machine has; threads are what the launcher says."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.jobs.rank import keep_compiled
from flows.engines.cores import TUNABLES, granted_cores, usable_cores
from flows.launcher import rank_environment


@pytest.mark.parametrize(
    ("group", "limits", "cores"),
    [
        ("/", {"": "200000 100000"}, 2),  # in a container
        ("/system.slice/td.service", {"system.slice/td.service": "350000 100000"}, 3),
        ("/a/b", {"a": "400000 100000", "a/b": "max 100000"}, 4),
        ("/a/b", {"a": "400000 100000", "a/b": "50000 100000"}, 1),
        ("/a/b", {"a/b": "max 100000"}, None),
        ("/a", {}, None),
        ("/a", {"a": "unlimited"}, None),
    ],
)
def test_the_tightest_of_a_group_s_limits_counts(
    tmp_path: Path, group: str, limits: dict[str, str], cores: int | None
) -> None:
    own = tmp_path / "self"
    own.write_text(f"0::{group}\n")
    for name, limit in limits.items():
        (tmp_path / "cgroups" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroups" / name / "cpu.max").write_text(f"{limit}\n")
    assert granted_cores(tmp_path / "cgroups", own) == cores


def test_of_other_control_groups_no_limit_is_known(tmp_path: Path) -> None:
    assert granted_cores(tmp_path, tmp_path / "none") is None
    (tmp_path / "self").write_text("12:cpu,cpuacct:/docker/abc\n")
    assert granted_cores(tmp_path, tmp_path / "self") is None
    assert usable_cores() >= 1


def test_a_rank_computes_with_the_threads_that_it_was_told_whatever_the_shell_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other threads are other sums: MKL's variable, as HPC and conda shells set it, would win."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS", "MKL_CBWR"):
        monkeypatch.setenv(name, "2")
    code = "import torch; print(torch.get_num_threads())"
    env = rank_environment(0, 1, 1)
    assert env["MKL_CBWR"] == "2", "what else a shell asks of MKL is the user's choice"
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "1"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other settings")
def test_a_rank_keeps_the_memory_of_large_tensors_for_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import resource, numpy
def pages():
    held = [numpy.ones(2_000_000) for _ in range(8)]  # 8 times 16 MB
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pages()
first = pages()
print(pages() - first)
"""
    monkeypatch.delenv(TUNABLES, raising=False)
    found = {}
    for name, env in {"rank": rank_environment(0, 1, 1), "other": dict(os.environ)}.items():
        found[name] = int(subprocess.check_output([sys.executable, "-c", code], env=env, text=True))
    assert found["rank"] < 100 < 1000 < found["other"], found
    monkeypatch.setenv(TUNABLES, "glibc.malloc.trim_threshold=1:glibc.malloc.hugetlb=0")
    assert int(subprocess.check_output([sys.executable, "-c", code], env=rank_environment(0, 1, 1), text=True)) > 1000


def test_torch_keeps_what_it_compiles_where_nobody_else_can_put_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that they are gone after this test
        monkeypatch.delenv(name)
    keep_compiled(tmp_path / "compiled")
    assert cache_dir() == str(tmp_path / "compiled")
    assert os.environ["TRITON_CACHE_DIR"].startswith(cache_dir())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "named"))
    keep_compiled(tmp_path)
    assert cache_dir() == str(tmp_path / "named")
