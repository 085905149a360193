"""Add the Prefect profile `train-diffusion` to the user's own Prefect home, and make it the active one. On demand only."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from stack import BIN, SERVERS

NAME = "train-diffusion"


def main() -> None:
    """Write the profile. What `prefect` keeps in this project's folder is left as it is."""
    if not SERVERS.exists():
        raise SystemExit("The servers are not up: run make up first, the profile takes their addresses.")
    servers = json.loads(SERVERS.read_text())
    # Outside the project's folder, so that its pyproject.toml does not redirect the Prefect home.
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_HOME"} | {
        "PREFECT_PLUGINS_ENABLED": "false"
    }
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    env["PREFECT_HOME"] = str(home)

    def prefect(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "prefect"), *arguments]
        return subprocess.run(command, cwd=Path.home(), env=env, check=check, capture_output=True, text=True)

    before = prefect("profile", "ls").stdout
    if NAME not in before:
        prefect("profile", "create", NAME)
    values = {key: servers[key] for key in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING") if key in servers}
    values["PREFECT_PLUGINS_ENABLED"] = "true"
    # The file is the user's own, and holds a password from now on.
    prefect("--profile", NAME, "config", "set", *(f"{key}={value}" for key, value in values.items()))
    (home / "profiles.toml").chmod(0o600)
    prefect("profile", "use", NAME)
    print(
        f"The profile '{NAME}' is in {home / 'profiles.toml'} and active: prefect deployment run {NAME} works from any folder."
    )
    print("Another one: prefect profile ls, prefect profile use NAME.")


if __name__ == "__main__":
    main()
