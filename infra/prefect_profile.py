"""The Prefect profile `train-diffusion` in the user's own Prefect home: `python infra/prefect_profile.py [follow | withdraw]`.

Without a word it is made, or made anew, and becomes the active one: on demand only. `make up` has one that is there follow the
servers, and `make down` withdraws their address and password from it: without them nobody is asked, whoever listens there next.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lifecycle import SERVERS

from diffusion.trust.private import read_private

NAME = "train-diffusion"
OF_THE_SERVERS = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")


def user_home() -> Path:
    """Prefect's folder in the user's home, not the one of this project."""
    return Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))


def exists() -> bool:
    """Whether the user has made the profile."""
    path = user_home() / "profiles.toml"
    return path.exists() and f"[profiles.{NAME}]" in path.read_text(encoding="utf-8")


def main() -> None:
    """Do what the command line says. What `prefect` keeps in this project's folder is left as it is."""
    verb = sys.argv[1] if len(sys.argv) > 1 else "make"
    if verb not in ("make", "follow", "withdraw"):
        raise SystemExit(__doc__)
    if verb != "make" and not exists():
        return
    try:
        servers: dict[str, str] = json.loads(read_private(SERVERS))
    except FileNotFoundError:
        if verb == "withdraw":
            return
        raise SystemExit("The servers are not up: run make up first, the profile takes their addresses.") from None
    # Before Prefect is imported: here its settings come from the user's home, and not from this folder's pyproject.toml.
    home = user_home()
    os.umask(0o077)
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"PREFECT_HOME": str(home), "PREFECT_PLUGINS_ENABLED": "false"}
    os.environ.pop("PREFECT_PROFILES_PATH", None)
    path = home / "profiles.toml"
    if path.exists():
        path.chmod(0o600)  # it is the user's own, and holds a password from now on
    from prefect.settings import load_profiles, save_profiles
    from prefect.settings.profiles import _cast_settings

    profiles = load_profiles()
    if verb != "make":  # another installation's servers may have the profile
        known = profiles[NAME].to_environment_variables().get("PREFECT_API_URL")
        if known not in (None, servers.get("PREFECT_API_URL")):
            return
    values = {name: None if verb == "withdraw" else servers.get(name) for name in OF_THE_SERVERS}
    values["PREFECT_PLUGINS_ENABLED"] = "true"
    profiles.update_profile(NAME, _cast_settings(values))
    if verb == "make":
        profiles.set_active(NAME)
    save_profiles(profiles)
    if verb == "make":
        print(f"The profile '{NAME}' is in {path} and active: prefect deployment run {NAME} works from any folder.")
        print("Another one: prefect profile ls, prefect profile use NAME.")


if __name__ == "__main__":
    main()
