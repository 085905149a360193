"""The container files, as far as they can be checked without a container engine."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((PROJECT / "infra" / "compose.yaml").read_text())
SECRETS = {"POSTGRES_PASSWORD", "S3_SECRET_KEY", "ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"}


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_secret_must_be_given_and_none_has_a_default() -> None:
    text = (PROJECT / "infra" / "compose.yaml").read_text()
    assert {name for name in SECRETS if f"${{{name}:?" in text} == SECRETS
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", text))
    assert used - SECRETS <= {"PREFECT_PORT", "MLFLOW_PORT", "COMMIT"}
    example = (PROJECT / "infra" / "example.env").read_text()
    assert {line.rstrip("=") for line in example.splitlines() if line and not line.startswith("#")} == SECRETS


def test_dependencies_are_services_that_report_their_health() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        for name, wanted in service.get("depends_on", {}).items():
            assert name in services
            assert wanted["condition"] == "service_completed_successfully" or "healthcheck" in services[name]


@pytest.mark.parametrize(
    "line", re.findall(r"^COPY (.+)$", (PROJECT / "infra" / "Dockerfile").read_text(), re.MULTILINE)
)
def test_what_the_image_copies_exists_and_is_not_ignored(line: str) -> None:
    kept = {entry[1:] for entry in (PROJECT / ".dockerignore").read_text().splitlines() if entry.startswith("!")}
    for name in line.split()[:-1]:
        assert (PROJECT / name).exists()
        assert name in kept
