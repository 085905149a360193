"""The files for Kubernetes, as far as they can be checked without one: their shape was checked by hand (docs/cluster.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "kubernetes"
OBJECTS: list[dict[str, Any]] = [
    one
    for name in yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    for one in yaml.safe_load_all((FOLDER / name).read_text())
]
SECRET = {line.partition("=")[0] for line in (FOLDER / "example.env").read_text().splitlines() if "=" in line}


def pods(found: Any) -> Iterator[dict[str, Any]]:
    """What a pod is made from, wherever it stands."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        for value in found.values():
            yield from pods(value)
    elif isinstance(found, list):
        for value in found:
            yield from pods(value)


PODS = [pod for one in OBJECTS for pod in pods(one)]
CONTAINERS = [container for pod in PODS for container in pod["containers"]]


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["containers"][0]["name"])
def test_no_pod_may_more_than_it_must(pod: dict[str, Any]) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_every_secret_is_a_reference_and_each_is_used() -> None:
    assert len(CONTAINERS) == 6
    used = set()
    for container in CONTAINERS:
        for variable in container.get("env", ()):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                used.add(reference["key"])
            elif re.search("PASSWORD|SECRET|TOKEN|KEY|AUTH_STRING", variable["name"]):
                assert variable["value"] == "admin:$(PREFECT_PASSWORD)", variable
        assert not re.search(r"PASSWORD|SECRET|://", str(container.get("command", "")))
    assert used == SECRET | {"auth_token"}


def test_nothing_is_reached_from_outside() -> None:
    kinds = [one["kind"] for one in OBJECTS]
    assert set(kinds) == {"Deployment", "Service", "RayCluster", "NetworkPolicy"}
    assert [one["spec"].get("type", "ClusterIP") for one in OBJECTS if one["kind"] == "Service"] == ["ClusterIP"] * 2
    nobody, *others = [one["spec"] for one in OBJECTS if one["kind"] == "NetworkPolicy"]
    assert nobody == {"podSelector": {}, "policyTypes": ["Ingress"]}
    assert all("podSelector" in source for one in others for rule in one["ingress"] for source in rule["from"])
    assert [one["spec"]["authOptions"] for one in OBJECTS if one["kind"] == "RayCluster"] == [{"mode": "token"}]


def test_ray_is_the_one_that_the_image_has() -> None:
    lock = (FOLDER.parents[1] / "requirements-ray.lock").read_text()
    (cluster,) = [one for one in OBJECTS if one["kind"] == "RayCluster"]
    assert f"\nray=={cluster['spec']['rayVersion']} " in lock
