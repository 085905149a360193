"""All routes of both servers, and of a demo beside them, without a password."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import PATIENCE
from tests.end_to_end.test_running import ask
from tests.processes import family, listens_at
from tests.stack import Project

pytestmark = pytest.mark.slow

MLFLOW_ROUTES = """
import json, os, sys
os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"] = "of no server's"
os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
os.environ["MLFLOW_FLASK_SERVER_SECRET_KEY"] = "none"
sys.path.insert(0, "infra")
import mlflow_auth
from pathlib import Path
home = Path(sys.argv[1])
mlflow_auth.write_settings(home / "auth.ini", f"sqlite:///{home / 'auth.db'}")
os.environ["MLFLOW_AUTH_CONFIG_PATH"] = str(home / "auth.ini")
from mlflow.server import app
from mlflow.server.auth import create_app
served = create_app()
found = {(method, rule.rule) for rule in app.url_map.iter_rules() for method in rule.methods - {"OPTIONS", "HEAD"}}
found |= {(method.upper(), path) for path, verbs in served.openapi()["paths"].items() for method in verbs}
print(json.dumps(sorted(found)))
"""


def basic(password: str, user: str = "admin") -> dict[str, str]:
    return {"Authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}


def walk(server: str, routes: list[tuple[str, str]], headers: dict[str, str]) -> dict[tuple[str, str], int]:
    """What each route answers."""
    connection, answers = HTTPConnection(urlsplit(server).netloc, timeout=PATIENCE), {}
    for method, route in routes:
        path = re.sub(r"<[^>]*>|\{[^}]*\}", "11111111-1111-1111-1111-111111111111", route)
        connection.request(method, path, b"{}", headers | {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        answers[method, route] = answer.status
    connection.close()
    return answers


def test_no_route_of_prefect_answers_without_the_password(stack: Project, password: str) -> None:
    server = stack.servers["PREFECT_API_URL"].removesuffix("/api")
    connection = HTTPConnection(urlsplit(server).netloc, timeout=PATIENCE)
    connection.request("GET", "/openapi.json", headers=basic(password))
    known = json.loads(connection.getresponse().read())["paths"]
    routes = [(verb.upper(), f"/api{path}") for path, verbs in known.items() for verb in verbs]
    assert len(routes) > 150
    alive = {("GET", "/api/health"), ("GET", "/api/ready")}
    for headers in ({}, basic("not the password"), {"Authorization": "Bearer x"}):  # Prefect compares, MLflow hashes
        answers = walk(server, routes, headers)
        assert {route for route, status in answers.items() if status != 401} == alive, answers


def test_no_route_of_mlflow_answers_without_the_password(stack: Project, tmp_path: Path) -> None:
    listed = stack.shell(sys.executable, "-c", MLFLOW_ROUTES, str(tmp_path))
    assert listed.returncode == 0, listed.stderr
    routes = [(method, path) for method, path in json.loads(listed.stdout.splitlines()[-1])]
    assert len(routes) > 150
    server = stack.servers["MLFLOW_TRACKING_URI"]
    info = {("GET", f"/{api}/3.0/mlflow/server-info") for api in ("api", "ajax-api")}
    answers = walk(server, routes, {})
    known = {route for route, status in answers.items() if status != 401}
    assert known == {("GET", "/health"), ("GET", "/static-files/<path:path>"), *info}, answers
    # Other ways to say who one is: half of it knows nothing of them, answers 500, and lets nobody pass.
    answers = walk(server, [route for route in routes[::10] if route not in known], {"Authorization": "Bearer x"})
    assert set(answers.values()) == {401, 500}
    assert walk(server, routes[:1], basic("not the password")) == {routes[0]: 401}
    with urllib.request.urlopen(server + info.pop()[1], timeout=PATIENCE) as answer:
        said = json.load(answer)
    assert said.pop("store_type") == "SqlStore"
    assert {type(value) for value in said.values()} <= {bool, dict}, said
    assert str(stack.folder) not in str(said)


def test_the_demo_s_server_wants_a_password_while_a_stack_runs_on_the_same_data(stack: Project) -> None:
    env = stack.env | {"TRAIN_DIFFUSION_HOME": str(stack.folder / "var")}
    command = [sys.executable, "-m", "flows.commands.demo", "--source", "generated", "--set", "data.images=100000"]
    log = stack.folder / "demo.log"
    with log.open("wb") as output:
        demo = subprocess.Popen(command, cwd=Path(__file__).parents[2], env=env, stdout=output, stderr=output)
    try:
        ports: set[int] = set()
        deadline = time.monotonic() + PATIENCE
        while not ports:
            assert demo.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
            for process in family(psutil.Process(demo.pid)):
                ports |= {port for _, port in listens_at(process)}
        password = stack.servers["MLFLOW_TRACKING_PASSWORD"]
        for port in ports:
            api = f"http://127.0.0.1:{port}/api"
            while (status := ask(f"{api}/admin/version", "GET", {})[0]) not in (401, 403):
                assert status != 200, "an answer without a password"
                assert time.monotonic() < deadline
            assert ask(f"{api}/admin/version", "GET", basic("", ""))[0] == 401
            assert ask(f"{api}/admin/version", "GET", basic(password))[0] == 401
            assert ask(f"{api}/block_documents/", "GET", basic("", "demo"))[0] == 401
    finally:
        started = family(psutil.Process(demo.pid))
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        demo.wait()
    assert ask(f"{stack.servers['PREFECT_API_URL']}/admin/version", "GET", basic(password))[0] == 200
