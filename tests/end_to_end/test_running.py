"""While everything runs, servers, worker, flow and ranks: nothing of it is open to other users of the machine."""

from __future__ import annotations

import os
import stat
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import PATIENCE
from tests.running import STORE_KEY, Seen, Training
from tests.security.other_user import as_another_user, as_root
from tests.stack import Project

pytestmark = pytest.mark.slow


def named(seen: dict[int, Seen], word: str) -> list[Seen]:
    return [one for one in seen.values() if word in one.arguments]


def test_the_test_sees_what_it_must(training: Training) -> None:
    for word in ("prefect server", "mlflow", "worker start", "diffusion.training.job", "diffusion.evaluation.job"):
        assert named(training.seen, word), sorted(one.arguments[:100] for one in training.seen.values())
    ranks = named(training.seen, "diffusion.training.job")
    assert {one.environment.get("RANK") for one in ranks} == {"0", "1"}


def test_nothing_listens_beyond_loopback(training: Training) -> None:
    listening = {address: one.arguments for one in training.seen.values() for address in one.listens}
    assert set(listening) <= {"127.0.0.1", "::1"}, listening


def test_no_secret_is_in_an_argument(training: Training, password: str, stack: Project) -> None:
    key = (stack.folder / "var/stack/prefect-encryption-key").read_text()
    for one in training.seen.values():
        assert not [secret for secret in (password, key, STORE_KEY) if secret in one.arguments], one.arguments


def test_each_process_has_the_secrets_that_it_needs_and_no_others(
    training: Training, password: str, stack: Project
) -> None:
    key = (stack.folder / "var/stack/prefect-encryption-key").read_text()

    def holding(secret: str) -> list[str]:
        return [
            one.arguments
            for one in training.seen.values()
            if any(secret in value for value in one.environment.values())
        ]

    for arguments in holding(password):
        assert "diffusion." not in arguments, "a rank has the servers' password"
    for arguments in holding(key):
        assert "server" in arguments, arguments
        assert "mlflow" not in arguments.partition("\n")[0], arguments
    for arguments in holding(STORE_KEY):
        assert "prefect server" not in arguments, arguments
        assert "mlflow server" not in arguments, arguments


def test_no_file_of_ours_can_be_read_by_others(training: Training, stack: Project) -> None:
    home = stack.folder / "var"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    paths = [
        path for path in home.rglob("*") if not path.is_symlink() and home / "downloads" not in (path, *path.parents)
    ]
    assert len(paths) > 100
    open_paths = []
    for path in paths:
        with suppress(FileNotFoundError):  # a journal of a database, gone meanwhile
            if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
                open_paths.append(f"{path} {mode:o}")
    assert open_paths == []


@as_root
def test_another_user_reads_nothing(training: Training, stack: Project) -> None:
    home = str(stack.folder / "var")
    wanted = [str(path) for path in Path(home).rglob("*") if path.is_file()]

    def read() -> list[str]:
        got = []
        assert os.listdir(os.path.dirname(home)), "the test's own folders are closed"
        for path in (home, *wanted):
            try:
                os.listdir(path) if os.path.isdir(path) else os.close(os.open(path, os.O_RDONLY))
                got.append(path)
            except PermissionError:
                continue
        return got

    assert as_another_user(read) == []


def test_no_log_holds_a_secret(training: Training, stack: Project, password: str) -> None:
    key = (stack.folder / "var/stack/prefect-encryption-key").read_text()
    logs = {str(path): path.read_text(errors="replace") for path in (stack.folder / "var").rglob("*.log")}
    assert len(logs) > 3
    for path, text in (logs | {"what was typed": training.printed, "make up": stack.printed}).items():
        assert not [secret for secret in (password, key, STORE_KEY) if secret in text], path


ROUTES = ("/api/flows/filter", "/api/block_documents/filter", "/api/variables/filter", "/api/admin/version")


def test_other_pages_and_other_names_are_refused_by_the_servers(stack: Project, password: str) -> None:
    prefect = stack.servers["PREFECT_API_URL"].removesuffix("/api")
    mlflow = stack.servers["MLFLOW_TRACKING_URI"]
    for server, path in [*((prefect, route) for route in ROUTES), (mlflow, "/ajax-api/2.0/mlflow/experiments/search")]:
        # MLflow answers pages of this machine, whatever their port; nothing can be set against it (docs/security.md).
        for origin in ("https://example.org", "null", *(["http://127.0.0.1:1"] if server == prefect else [])):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            answer = ask(server + path, "OPTIONS", headers)
            allowed = answer[1].get("access-control-allow-origin")
            assert allowed in (None, prefect, mlflow), (server, origin, allowed)
        assert ask(server + path, "POST", {})[0] == 401
    # A page whose name was made to point here sends no password: the browser keeps that for the servers' own names.
    for server, path in ((mlflow, "/version"), (prefect, "/api/admin/version")):
        assert ask(server + path, "GET", {"Host": "rebound.example.org"})[0] == 401
    known = {"Authorization": f"Basic {b64encode(f'admin:{password}'.encode()).decode()}"}
    experiments = f"{mlflow}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert ask(experiments, "GET", known)[0] == 200
    assert ask(experiments, "GET", known | {"Host": "rebound.example.org"})[0] == 403


def ask(url: str, method: str, headers: dict[str, str]) -> tuple[int, dict[str, str]]:
    request = urllib.request.Request(url, method=method, headers=headers, data=b"{}" if method == "POST" else None)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, {key.lower(): value for key, value in response.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, {key.lower(): value for key, value in error.headers.items()}
