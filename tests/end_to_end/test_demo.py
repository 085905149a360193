"""`make demo`, as a process: its table, its fallback, its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.commands import demo as command
from tests.conftest import TINY

pytestmark = pytest.mark.slow

NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


def demo(home: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the demo with the tiny recipe in a home of its own."""
    sizes = [
        word for key, value in (TINY | {"evaluation.every_images": 256}).items() for word in ("--set", f"{key}={value}")
    ]
    # Where whoever runs the tests has the data set, and which server a test before this one spoke to, is not the demo's business.
    own = ("EUROSAT_ARCHIVE", "MLFLOW_TRACKING_URI")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(
        [sys.executable, "-m", "flows.commands.demo", *sizes, "--processes", "1", *arguments],
        env=inherited | {"TRAIN_DIFFUSION_HOME": str(home)} | env,
        capture_output=True,
        text=True,
    )


def test_without_eurosat_it_goes_on_with_generated_patches_and_says_so(tmp_path: Path) -> None:
    done = demo(tmp_path, **NO_NETWORK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NOT EUROSAT" in done.stderr
    for label in ("dataset  generated-fields-and-water", "steps", "loss", "bits_per_dim", "fid_eurosat", "sample grid"):
        assert label in done.stdout, done.stdout
    fails = "It is the first version: it fails 'fid_eurosat is below that of one picture for all'"
    assert f"generated-fields-and-water-ddpm 1, challenger. {fails}" in done.stdout, (
        "after a few seconds it is no model to go live"
    )
    assert "The flow's own share" in done.stdout
    assert "Traceback" not in done.stderr
    grid = next(line.split()[-1] for line in done.stdout.splitlines() if "sample grid" in line)
    assert Path(grid).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "one"])
def test_a_seed_is_a_whole_number(
    seed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", f"--seed={seed}"])
    with pytest.raises(SystemExit):
        command.main()
    assert "it must be a whole number from 0 to 2^63 - 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--set", "data.imagse=1"], {}, "did you mean 'data.images'"),
        ([], {"EUROSAT_ARCHIVE": "/no/such/archive.zip"}, "No archive at /no/such/archive.zip"),
        (["--source", "generated"], {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "does not answer"),
    ],
)
def test_bad_input_is_said_in_one_line_with_exit_code_1(
    tmp_path: Path, arguments: list[str], env: dict[str, str], said: str
) -> None:
    done = demo(tmp_path, *arguments, **(NO_NETWORK | env))
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert not (tmp_path / "store" / "datasets").exists()
    assert not (tmp_path / "runs").exists()
