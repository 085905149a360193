"""Settings: what the environment says is taken as it is meant, or refused with a sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.errors import SettingsError
from diffusion.settings import reach_loopback_directly, settings

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EUROSAT_ARCHIVE", "MLFLOW_TRACKING_URI", *os.environ):
        if name.startswith("TRAIN_DIFFUSION_") or name in ("EUROSAT_ARCHIVE", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)


def test_nothing_set_all_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = settings()
    assert found.home == tmp_path / "var"
    assert found.store_uri == str(tmp_path / "var/store")
    assert found.tracking_uri == f"sqlite:///{tmp_path}/var/mlflow/mlflow.db"
    assert (found.archive, found.inception, found.deterministic, found.notify) == (None, None, False, ())
    monkeypatch.setenv("TRAIN_DIFFUSION_HOME", "~/elsewhere")
    monkeypatch.setenv("TRAIN_DIFFUSION_STORE", "")
    assert settings().store_uri == str(Path.home() / "elsewhere/store"), "what is empty is not set"


@pytest.mark.parametrize(
    ("text", "meant"), [("false", False), ("0", False), ("no", False), ("true", True), ("1", True)]
)
def test_a_switch_does_what_it_says(monkeypatch: pytest.MonkeyPatch, text: str, meant: bool) -> None:
    monkeypatch.setenv("TRAIN_DIFFUSION_DETERMINISTIC", text)
    assert settings().deterministic is meant


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TRAIN_DIFFUSION_DETERMINISTIC", "maybe", "TRAIN_DIFFUSION_DETERMINISTIC: .* It is true or false"),
        ("TRAIN_DIFFUSION_STOR", "x", "did you mean 'TRAIN_DIFFUSION_STORE'"),
        ("train_diffusion_store", "x", "no setting train_diffusion_store"),
        ("PREFECT_PORT", "http", "PREFECT_PORT: .*valid integer"),
        ("MLFLOW_PORT", "70000", "MLFLOW_PORT: .*less than or equal to 65535"),
        ("AUTH", "of", "AUTH: .*'on' or 'off'"),
    ],
)
def test_what_can_t_be_meant_is_refused_with_what_can(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=said):
        settings()


def test_blocks_to_notify_have_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_DIFFUSION_NOTIFY", "slack-webhook/ops, smtp-mail/ops,")
    assert settings().notify == ("slack-webhook/ops", "smtp-mail/ops")


@pytest.mark.parametrize("command", ["diffusion.settings", "flows.commands.demo", "flows.commands.reproduce"])
def test_a_misspelt_setting_ends_a_command_before_it_starts(tmp_path: Path, command: str) -> None:
    env = {"PATH": os.environ["PATH"], "TRAIN_DIFFUSION_HOME": str(tmp_path / "var"), "TRAIN_DIFFUSION_NOTIFI": "x"}
    env["PREFECT_HOME"] = str(tmp_path)  # else that of the checkout
    more = ["--version", "1"] if command == "flows.commands.reproduce" else []
    done = subprocess.run([sys.executable, "-m", command, *more], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: There is no setting TRAIN_DIFFUSION_NOTIFI: did you mean 'TRAIN_DIFFUSION_NOTIFY'?\n"
    assert not (tmp_path / "var").exists()


def test_a_newcomer_s_first_command_says_nothing_of_folders(tmp_path: Path) -> None:
    """Prefect makes its folder in var/, which `make install` makes, and nobody else may look into."""
    for path in (PROJECT / "Makefile", PROJECT / "pyproject.toml", *PROJECT.glob("*.lock")):
        shutil.copy(path, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    subprocess.run(["make", "install"], cwd=tmp_path, check=True)
    assert (tmp_path / "var").stat().st_mode & 0o777 == 0o700
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", "import prefect"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "var/prefect").is_dir()


def test_all_settings_are_printed_and_no_secret(tmp_path: Path) -> None:
    """`make settings`."""
    secret = "s3cr3t-of-the-tests"
    env = {
        "PATH": os.environ["PATH"],
        "TRAIN_DIFFUSION_HOME": str(tmp_path),
        "TRAIN_DIFFUSION_STORE": f"s3://key:{secret}@bucket",
        "MLFLOW_TRACKING_URI": f"https://user:{secret}@mlflow.example.org",
        "AWS_SECRET_ACCESS_KEY": secret,
    }
    done = subprocess.run([sys.executable, "-m", "diffusion.settings"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    assert f"TRAIN_DIFFUSION_HOME\n    set:     {tmp_path}\n    Folder of everything" in done.stdout
    assert "AWS_SECRET_ACCESS_KEY\n    set:     ***" in done.stdout
    assert "TRAIN_DIFFUSION_DETERMINISTIC\n    default: False\n    Compute on GPUs" in done.stdout


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "intra.example"}, "intra.example,127.0.0.1,localhost"),
        ({"no_proxy": "localhost, .example"}, "localhost,.example,127.0.0.1"),
        ({"NO_PROXY": "a", "no_proxy": "b"}, "b,a,127.0.0.1,localhost"),
        ({"NO_PROXY": "*", "no_proxy": "*"}, "*"),
    ],
)
def test_loopback_is_reached_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")  # so that it is set back
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    reach_loopback_directly()
    assert (os.environ["NO_PROXY"], os.environ["no_proxy"]) == (found, found)
