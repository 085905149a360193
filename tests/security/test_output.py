"""What leaves: no secret, whatever setting it stands in, and no byte that steers a terminal or fakes a line."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.data.sources.eurosat import read_archive
from diffusion.errors import DataError
from diffusion.jobs.reports import RankOutput
from diffusion.trust.redaction import first_line, fit_to_leave, redact_logs, redacted, shown

MARKER = "s3cr3t-of-the-tests"
ADDRESSES = {
    "TRAIN_DIFFUSION_STORE": f"s3://user:{MARKER}@bucket/prefix",
    "MLFLOW_TRACKING_URI": f"http://user:{MARKER}@127.0.0.1:9",
    "TRAIN_DIFFUSION_MLFLOW_UI": f"http://user:{MARKER}@127.0.0.1:9",
    "AWS_ENDPOINT_URL_S3": f"http://user:{MARKER}@127.0.0.1:9",
    "TRAIN_DIFFUSION_INCEPTION": f"https://user:{MARKER}@127.0.0.1:9/x.pt",
}
MORE = {
    "AWS_ENDPOINT_URL_S3": {"TRAIN_DIFFUSION_STORE": "s3://bucket"},
    "TRAIN_DIFFUSION_INCEPTION": {"TRAIN_DIFFUSION_INCEPTION_SHA256": "0" * 64},
}
KEYS = {
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": MARKER,
    "MLFLOW_TRACKING_USERNAME": "user",
    "MLFLOW_TRACKING_PASSWORD": MARKER,
    "PREFECT_API_AUTH_STRING": f"admin:{MARKER}",
}


def demo(home: Path, **env: str) -> str:
    """All that a demo says and leaves, which is expected to be refused."""
    command = [sys.executable, "-m", "flows.commands.demo", "--source", "generated"]
    command += ["--set", "evaluation.extractors=[inception]"] if "TRAIN_DIFFUSION_INCEPTION" in env else []
    environment = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "TRAIN_DIFFUSION_HOME": str(home)}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1"} | env
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert any(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    left = [path.read_text(errors="replace") for path in home.rglob("*") if path.is_file()]
    return "\n".join([done.stdout, done.stderr, *left])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ADDRESSES)
def test_a_secret_in_an_address_is_refused_and_not_repeated(setting: str, tmp_path: Path) -> None:
    said = demo(tmp_path / "var", **KEYS, **MORE.get(setting, {}), **{setting: ADDRESSES[setting]})
    assert "user or password in" in said
    assert MARKER not in said


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://user:{MARKER}@host/x failed",
        f"postgresql+psycopg2://prefect:{MARKER}@db/prefect",
        f"s3://{MARKER}@bucket",
        f"http://user:p@{MARKER}@host/x",
        f"postgresql://u:it's-{MARKER}@db/x",
        f"https://host/x?X-Amz-Signature={MARKER}&a=b",
        f"https://host/x?token={MARKER}",
        f"the password is {MARKER}!",
    ],
)
def test_texts_lose_their_secrets(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", f"admin:{MARKER}")
    assert MARKER not in redacted(text)
    assert MARKER not in str(DataError(text))


def test_what_is_no_secret_stays() -> None:
    for text in (
        "models:/eurosat-ddpm@champion",
        "https://host:80/path?page=2",
        "http://127.0.0.1:5000/models/eurosat@champion",
        "a@b.org took the mail",
        "s3://bucket/x",
    ):
        assert redacted(text) == text


def test_ranks_and_logs_say_no_secret_and_no_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", MARKER)
    written = io.StringIO()
    print(f"see {MARKER} \x1b[2J", file=RankOutput("[rank 0] ", written))
    before = logging.getLogRecordFactory()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log = logging.getLogger("tests.output")
    log.addHandler(handler)
    try:
        redact_logs()
        redact_logs()
        try:
            raise ValueError(f"inside {MARKER}\x1b]0;title\x07")
        except ValueError:
            log.exception("it failed: %s", MARKER)
    finally:
        logging.setLogRecordFactory(before)
        log.removeHandler(handler)
    for said in (written.getvalue(), stream.getvalue()):
        assert MARKER not in said
        assert "***" in said
        assert "\x1b" not in said
    assert "Traceback" in stream.getvalue()


def test_a_slip_in_somebody_s_log_call_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        redact_logs()
        logging.getLogger("tests.output").warning("%d", "no number")
    finally:
        logging.setLogRecordFactory(before)
    assert "no number" in caplog.text


def test_an_address_in_the_environment_gives_its_password_away_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_BACKEND", f"postgresql://mlflow:a/{MARKER}#1@db/mlflow")
    assert MARKER not in redacted(
        f"could not connect: postgresql://mlflow:a/{MARKER}#1@db/mlflow; password a/{MARKER}#1"
    )


@given(st.text())
def test_whatever_the_name_it_stays_on_its_line(name: str) -> None:
    assert shown(name).isprintable()
    assert set(fit_to_leave(name)) <= {c for c in fit_to_leave(name) if c.isprintable() or c in "\n\t"}


EVIL = "x\r\n\x1b[2K\x1b[1Aerror: all is well\u202egpj.jpg"


@pytest.mark.parametrize("place", ["outside", "damaged", "twice"])
def test_a_name_in_an_archive_writes_no_line_of_its_own(archive: Path, tmp_path: Path, place: str) -> None:
    path = tmp_path / "evil.zip"
    path.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(path, "a") as file:
        if place == "outside":
            file.writestr(f"../{EVIL}", b"x")
        elif place == "twice":
            file.writestr(f"2750/Forest/{EVIL}", b"x")
            file.writestr(f"EuroSAT_RGB/Forest/{EVIL}", b"x")
        else:
            file.writestr(f"2750/Forest/{EVIL}", bytes((1 << 20) + 1))
    with pytest.raises(DataError) as error:
        read_archive(path, "x", "y")
    text = str(error.value)
    assert "\n" not in text
    assert text.isprintable()


def test_of_a_secret_at_the_cut_nothing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", MARKER)
    for before in range(280, 301):
        said = first_line(ValueError(f"{'x' * before}{MARKER}\nmore"))
        assert MARKER[:3] not in said
        assert len(said) <= 300
    assert first_line(KeyError()) == "KeyError"
