"""Prefect's and MLflow's servers, asked as their pages ask them: a client of theirs takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import requests
from requests.adapters import HTTPAdapter, Retry

PATIENT = HTTPAdapter(
    max_retries=Retry(
        total=None,
        connect=240,
        read=240,
        status=240,
        status_forcelist=(500, 502, 503, 504),
        backoff_factor=0.2,
        backoff_max=1,
        allowed_methods=None,
    )
)
"""A server that is being started again is waited for."""
EXPERIMENT = "train-diffusion"


@dataclass(frozen=True)
class Servers:
    """Their addresses, and user and password of each."""

    prefect: str
    mlflow: str
    prefect_login: tuple[str, str]
    mlflow_login: tuple[str, str]

    @classmethod
    def of(cls, env: dict[str, str]) -> Servers:
        """Those that an environment names."""
        user, _, password = env["PREFECT_API_AUTH_STRING"].partition(":")
        mlflow_login = env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"]
        return cls(env["PREFECT_API_URL"], env["MLFLOW_TRACKING_URI"], (user, password), mlflow_login)

    def _prefect(self, path: str, **asked: Any) -> Any:
        return _answer(f"{self.prefect}/{path}", self.prefect_login, asked)

    def _mlflow(self, path: str, **asked: Any) -> Any:
        return _answer(f"{self.mlflow}/api/2.0/mlflow/{path}", self.mlflow_login, asked)

    def begin(self, name: str, parameters: dict[str, Any], due: datetime | None = None) -> str:
        """A new run of the deployment of that name: by hand, or as the scheduler makes one that is due then."""
        deployment = self._prefect(f"deployments/name/{name}/{name}")["id"]
        made = self._prefect(
            f"deployments/{deployment}/create_flow_run",
            parameters=parameters,
            tags=["auto-scheduled"] if due else [],
            state={"type": "SCHEDULED", "state_details": {"scheduled_time": due.isoformat()} if due else {}},
            idempotency_key=uuid4().hex,  # asked again, it is the same one
        )
        return str(made["id"])

    def state(self, flow_run: str) -> tuple[str, str]:
        """Type and message of a flow run's state."""
        state = self._prefect(f"flow_runs/{flow_run}")["state"]
        return state["type"], state["message"] or ""

    def tasks(self, flow_run: str) -> list[str]:
        """The types of its tasks' states."""
        found = self._prefect("task_runs/filter", flow_runs={"id": {"any_": [flow_run]}})
        return [task["state"]["type"] for task in found]

    def runs(self) -> list[dict[str, Any]]:
        """What MLflow has of our runs, with their losses."""
        experiments = self._mlflow("experiments/search", max_results=100).get("experiments", [])
        own = [one["experiment_id"] for one in experiments if one["name"] == EXPERIMENT]
        found = self._mlflow("runs/search", experiment_ids=own, max_results=1000).get("runs", []) if own else []
        return [self._run(run) for run in found]

    def _run(self, run: dict[str, Any]) -> dict[str, Any]:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        params = {param["key"]: param["value"] for param in run["data"].get("params", [])}
        history = f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=train/loss&max_results=25000"
        points = self._mlflow(history).get("metrics", [])
        return {
            "id": run["info"]["run_id"],
            "key": tags["train_diffusion.run"],
            "status": run["info"]["status"],
            "failure": tags.get("failure", ""),
            "seed": params.get("seed"),
            "losses": [[int(point.get("step", 0)), point["value"]] for point in points],
        }


def _answer(url: str, login: tuple[str, str], asked: dict[str, Any]) -> Any:
    with requests.Session() as session:
        session.trust_env = False  # no proxy of the tests'
        session.mount("http://", PATIENT)
        answer = session.post(url, json=asked, auth=login) if asked else session.get(url, auth=login)
    answer.raise_for_status()
    return answer.json()
