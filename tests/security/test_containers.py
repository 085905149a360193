"""The container files, as far as they can be checked without a container engine."""

import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.fernet import Fernet

PROJECT = Path(__file__).resolve().parents[2]
INFRA = PROJECT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = (INFRA / "example.env").read_text()
SECRETS = {line.rstrip("=") for line in EXAMPLE.splitlines() if line and not line.startswith("#")}


def test_ports_are_published_on_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_what_ends_is_started_again_but_what_has_done_its_work() -> None:
    assert {name for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"} == {*SERVICES} - {
        "buckets"
    }


def test_every_secret_must_be_given_and_none_has_a_default_or_is_an_argument() -> None:
    text = (INFRA / "compose.yaml").read_text()
    assert {name for name in SECRETS if f"${{{name}:?" in text} == SECRETS
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", text))
    assert used - SECRETS <= {
        "PREFECT_PORT",
        "MLFLOW_PORT",
        "COMMIT",
        "IMAGES",
        "TORCH_LOCK",
        "PIP_EXTRA_INDEX_URL",
        *IMAGES,
    }
    for name, service in SERVICES.items():
        arguments = yaml.safe_dump([service.get("command"), service.get("entrypoint"), service.get("healthcheck")])
        assert not [secret for secret in SECRETS if f"${{{secret}" in arguments], name
        # Inside a container too, an argument is seen by all of it: only a shell's own words may hold one.
        assert "psql" not in arguments
        assert "://" not in re.sub(r"(http|s3)://[a-z0-9.:/-]+", "", arguments), name


def test_each_service_knows_no_more_secrets_and_no_more_neighbours_than_it_needs() -> None:
    known = {
        name: {secret for secret in SECRETS if f"${{{secret}" in yaml.safe_dump(service.get("environment", {}))}
        for name, service in SERVICES.items()
    }
    assert known == {
        "postgres": {"POSTGRES_PASSWORD", "PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD"},
        "s3": {"S3_ADMIN_SECRET", "S3_MLFLOW_SECRET", "S3_WORKER_SECRET"},
        "buckets": {"S3_ADMIN_SECRET"},
        "prefect-server": {"PREFECT_DATABASE_PASSWORD", "PREFECT_PASSWORD", "PREFECT_ENCRYPTION_KEY"},
        "mlflow-server": {"MLFLOW_DATABASE_PASSWORD", "S3_MLFLOW_SECRET", "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY"},
        "worker": {"S3_WORKER_SECRET", "PREFECT_PASSWORD", "MLFLOW_PASSWORD"},
    }
    met = {
        tuple(sorted((a, b)))
        for a, one in SERVICES.items()
        for b, other in SERVICES.items()
        if a != b and set(one["networks"]) & set(other["networks"])
    }
    assert ("postgres", "worker") not in met
    assert ("postgres", "s3") not in met
    assert "-ip=127.0.0.1 -ip.bind=127.0.0.1 -s3.ip.bind=0.0.0.0" in str(SERVICES["s3"]["command"]), (
        "what asks for no key is met by nobody"
    )
    assert ("prefect-server", "s3") not in met
    internal = {name for name, network in COMPOSE["networks"].items() if network and network.get("internal")}
    assert internal == set(COMPOSE["networks"]) - {"servers"}


def test_no_service_may_more_than_it_must() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert not service.get("privileged"), name
        assert "cap_add" not in service or name == "postgres", name
    assert "USER trainer" in (INFRA / "Dockerfile").read_text()


IMAGES = ("PYTHON_IMAGE", "POSTGRES_IMAGE", "S3_IMAGE")
"""Variables that name images of another registry."""


def test_every_image_from_elsewhere_is_named_by_its_digest() -> None:
    dockerfile, compose = (INFRA / "Dockerfile").read_text(), (INFRA / "compose.yaml").read_text()
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE) + [service["image"] for service in SERVICES.values()]
    assert {*bases} == {
        "${PYTHON_IMAGE}",
        "train-diffusion",
        *re.findall(r"\$\{(?:POSTGRES|S3)_IMAGE:-[^}]+\}", compose),
    }
    images = re.findall(r"PYTHON_IMAGE=(\S+)", dockerfile) + re.findall(r"\{\w+_IMAGE:-([^}]+)\}", compose)
    assert {image.split(":")[0] for image in images} == {"python", "postgres", "chrislusf/seaweedfs"}
    assert not [image for image in images if not re.fullmatch(r"[a-z/]+:[0-9][\w.-]+@sha256:[0-9a-f]{64}", image)]
    assert len({image for image in images if image.startswith("python")}) == 1


def test_what_containers_get_is_there_before_them() -> None:
    """Compose can't write a config of its own into a container that is read-only: it refuses to start it."""
    assert [set(config) for config in COMPOSE["configs"].values()] == [{"file"}]
    assert all((INFRA / config["file"]).is_file() for config in COMPOSE["configs"].values())


def test_the_secrets_are_written_for_their_owner_alone_and_reach_no_image(tmp_path: Path) -> None:
    infra = tmp_path / "infra"
    infra.mkdir()
    for name in ("make_secrets.py", "example.env"):
        shutil.copy(INFRA / name, infra)
    subprocess.run([sys.executable, infra / "make_secrets.py"], check=True, umask=0)
    written = dict(line.split("=", 1) for line in (infra / ".env").read_text().splitlines())
    assert set(written) == SECRETS
    assert len(set(written.values())) == len(SECRETS)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{32,44}=?", value) for value in written.values())
    Fernet(written["PREFECT_ENCRYPTION_KEY"])
    assert stat.S_IMODE((infra / ".env").stat().st_mode) == 0o600
    again = subprocess.run([sys.executable, infra / "make_secrets.py"], capture_output=True, text=True)
    assert again.returncode == 1
    assert "is there already" in again.stderr
    # Those that were moved away, and those of Kubernetes, too.
    assert (PROJECT / ".dockerignore").read_text().splitlines()[-2:] == ["infra/.env*", "**/secrets.env"]
    assert {"/infra/.env*", "secrets.env"} <= {*(PROJECT / ".gitignore").read_text().splitlines()}


def test_dependencies_are_services_that_report_their_health() -> None:
    services = SERVICES
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
