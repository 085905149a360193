"""A password that is changed under all that use it, and servers that have none."""

from __future__ import annotations

import json
import stat
import sys
import urllib.request
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import PATIENCE, free_port
from tests.end_to_end.test_doors import basic
from tests.end_to_end.test_running import ask
from tests.stack import Project

pytestmark = pytest.mark.slow

PAGES = {
    "TRAIN_DIFFUSION_PREFECT_UI": "https://prefect.example.org",
    "TRAIN_DIFFUSION_MLFLOW_UI": "https://mlflow.example.org",
}


SAVE = "from prefect.blocks.system import Secret; Secret(value='kept').save('of-the-tests')"
LOAD = "from prefect.blocks.system import Secret; print(Secret.load('of-the-tests').get())"


def test_a_new_password_is_followed_everywhere_and_the_servers_answer_to_the_names_of_a_proxy(project: Project) -> None:
    """Both take a start of the servers."""
    made = project.watched("infra/prefect_profile.py")
    assert made.returncode == 0, made.stderr
    home = Path(project.env["HOME"])
    profiles = home / ".prefect" / "profiles.toml"
    old, before = project.servers["MLFLOW_TRACKING_PASSWORD"], project.servers
    saved = project.shell(sys.executable, "-c", SAVE)
    assert saved.returncode == 0, saved.stderr
    assert f"admin:{old}" in profiles.read_text()
    changed = project.stack("password", **PAGES)
    assert changed.returncode == 0, changed.stdout + changed.stderr
    servers = project.servers
    new = servers["MLFLOW_TRACKING_PASSWORD"]
    assert new != old
    assert new not in changed.stdout + changed.stderr
    assert {key: value for key, value in servers.items() if old not in before[key]} == {
        key: value for key, value in before.items() if old not in value
    }, "on the same ports"
    prefect, mlflow = servers["PREFECT_API_URL"].removesuffix("/api"), servers["MLFLOW_TRACKING_URI"]
    for url in (f"{prefect}/api/admin/version", f"{mlflow}/version"):
        assert [ask(url, "GET", basic(one))[0] for one in (old, new)] == [401, 200], url
    text = profiles.read_text()
    assert f"admin:{new}" in text
    assert old not in text
    assert stat.S_IMODE(profiles.stat().st_mode) == 0o600
    ran = project.shell("prefect", "deployment", "run", "clean-up", "--watch", folder=home)
    assert "Completed" in ran.stdout, ran.stdout + ran.stderr
    assert project.shell(sys.executable, "-c", LOAD).stdout.strip() == "kept", "blocks have lost their key"
    # What `up`, `profile` and `password` started was looked at meanwhile.
    for words in ("prefect\0server", "mlflow\0server", "infra/prefect_profile.py"):
        assert [line for line in project.arguments if words in line], words
    assert not [line for line in project.arguments if old in line or new in line]

    assert all(address in changed.stdout for address in PAGES.values()), changed.stdout
    search = f"{mlflow}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    for host, status in (("mlflow.example.org", 200), (urlsplit(mlflow).netloc, 200), ("other.example.org", 403)):
        assert ask(search, "GET", basic(new) | {"Host": host})[0] == status, host
    for server, path, page in (
        (prefect, "/api/flows/filter", PAGES["TRAIN_DIFFUSION_PREFECT_UI"]),
        (mlflow, "/ajax-api/2.0/mlflow/experiments/search", PAGES["TRAIN_DIFFUSION_MLFLOW_UI"]),
    ):
        for origin, allowed in ((page, page), ("https://other.example.org", None)):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert ask(server + path, "OPTIONS", headers)[1].get("access-control-allow-origin") == allowed, server
    with urllib.request.urlopen(f"{prefect}/ui-settings", timeout=PATIENCE) as answer:
        assert json.load(answer)["api_url"] == "https://prefect.example.org/api"


@pytest.mark.last(1)
def test_without_a_password_it_is_said_each_time_and_other_pages_are_refused(project: Project) -> None:
    assert project.stack("down").returncode == 0
    ports = {name: str(free_port()) for name in ("PREFECT_PORT", "MLFLOW_PORT")}
    up = project.stack("up", AUTH="off", **ports)
    assert up.returncode == 0, up.stderr
    assert "WARNING: the servers run without a password. Every user of this machine" in up.stdout
    assert "WARNING: the servers run without a password" in project.stack("status").stdout
    servers = project.servers
    assert not [name for name in servers if "PASSWORD" in name or "AUTH" in name]
    prefect, mlflow = servers["PREFECT_API_URL"].removesuffix("/api"), servers["MLFLOW_TRACKING_URI"]
    for server, path in ((prefect, "/api/flows/filter"), (mlflow, "/ajax-api/2.0/mlflow/experiments/search")):
        for origin in ("https://example.org", "null"):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            assert ask(server + path, "OPTIONS", headers)[1].get("access-control-allow-origin") is None
    experiment = f"{mlflow}/ajax-api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    assert ask(experiment, "GET", {})[0] == 200
    assert ask(experiment, "GET", {"Host": "rebound.example.org"})[0] == 403
    # What needs no leave, browsers send at once.
    connection = HTTPConnection(urlsplit(prefect).netloc, timeout=PATIENCE)
    for kind in ({}, {"Content-Type": "text/plain"}):
        connection.request(
            "POST", "/api/flows/", b'{"name": "from another page"}', {"Origin": "https://example.org", **kind}
        )
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (403, b'{"detail":"Missing CSRF token."}'), kind
    connection.close()
    ran = project.shell("prefect", "deployment", "run", "clean-up", "--watch")
    assert "Completed" in ran.stdout, ran.stdout + ran.stderr
