"""The Prefect plugin: finds the servers of `make up`, and lets `prefect deployment run train-diffusion` do without a slash.

Prefect calls `setup_environment` while it is imported, before its command line reads `sys.argv`. Nothing here imports
more than the standard library and what Prefect has imported itself: every `prefect` command in this environment pays for it.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any, NoReturn

from prefect.plugins import HookContext, SetupResult, register_hook

from diffusion.errors import SettingsError, UserError
from diffusion.settings import reach_loopback_directly, settings
from diffusion.trust.private import OTHERS_WRITE, read_private
from diffusion.trust.redaction import fit_to_leave, shown

SERVERS = "stack/servers.json"
"""In the home, written by `make up`: addresses and credentials as environment variables."""
KEYS = (
    "PREFECT_API_URL",
    "PREFECT_API_AUTH_STRING",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""All that is taken from that file."""
FLAGS = {"--watch", "--no-watch", "--help", "-h"}  # the options of `deployment run` that take no value
SECONDS = 30


@register_hook
def setup_environment(*, ctx: HookContext) -> SetupResult | None:
    """What is absent from the environment and known here; and, if a deployment is named bare, its full name in sys.argv."""
    reach_loopback_directly()
    position = name_position(sys.argv)
    try:
        home = settings().home
    except SettingsError as error:
        if position is not None:
            _give_up(str(error))
        return None  # what runs here says it itself
    env = _servers(home / SERVERS)
    if "PREFECT_HOME" not in os.environ and _is_own(home):
        # pyproject.toml has it relative to this folder; processes that start elsewhere need it absolute.
        env["PREFECT_HOME"] = str(home / "prefect")
    if position is not None and "/" not in sys.argv[position]:
        api = os.environ.get("PREFECT_API_URL") or env.get("PREFECT_API_URL") or ctx.api_url
        given = os.environ.get("PREFECT_API_AUTH_STRING") or env.get("PREFECT_API_AUTH_STRING")
        sys.argv[position] = full_name(sys.argv[position], api, given or _auth_of_profile(api))
    if position is not None:
        _check(sys.argv[position], sys.argv[position + 1 :])
    return SetupResult(env=env) if env else None


def _check(deployment: str, arguments: list[str]) -> None:
    """End the command with a sentence if a training is asked for that can't be."""
    if deployment.partition("/")[0] == "train-diffusion":
        from flows.submission import check_parameters  # which takes half a second to import

        try:
            check_parameters(arguments)
        except UserError as error:
            _give_up(str(error))


def _is_own(folder: Path) -> bool:
    """Whether a folder is this user's, and nobody else can put anything into it."""
    try:
        status = folder.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & OTHERS_WRITE


def _servers(path: Path) -> dict[str, str]:
    """What `make up` says, but for servers that the environment names otherwise: theirs must not get these credentials."""
    try:
        said = json.loads(read_private(path))
        servers = {key: str(said[key]) for key in KEYS if key in said}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, UserError) as error:
        print(f"{path} is not used ({error}): run make up again.", file=sys.stderr)
        return {}
    if "PREFECT_API_URL" in servers:
        # Servers without a password must not be sent the profile's, which belongs to another address.
        servers.setdefault("PREFECT_API_AUTH_STRING", "")
    for prefix, address in (("PREFECT_", "PREFECT_API_URL"), ("MLFLOW_", "MLFLOW_TRACKING_URI")):
        if os.environ.get(address, servers.get(address)) != servers.get(address):
            servers = {key: value for key, value in servers.items() if not key.startswith(prefix)}
    return {key: value for key, value in servers.items() if key not in os.environ}


def _auth_of_profile(api: str | None) -> str | None:
    """The credentials of the active Prefect profile (`make profile` writes one), for its own address alone."""
    from prefect.settings import get_current_settings

    settings = get_current_settings().api
    return settings.auth_string.get_secret_value() if settings.auth_string and settings.url == api else None


def name_position(arguments: list[str]) -> int | None:
    """Where in `prefect … deployment run … NAME …` the name stands; None if this is another command."""
    if not arguments or Path(arguments[0]).name not in ("prefect", "prefect.exe", "__main__.py", "-m"):
        return None
    if arguments[0] == "-m" and "prefect" not in sys.orig_argv:
        return None
    position = 1
    while position < len(arguments) and arguments[position].startswith("-"):
        position += 2 if arguments[position] in ("--profile", "-p") else 1
    if arguments[position : position + 2] not in (["deployment", "run"], ["deployments", "run"]):
        return None
    position += 2
    while position < len(arguments):
        argument = arguments[position]
        if argument in ("--id", "--help", "-h") or argument.startswith("--id="):
            return None
        if not argument.startswith("-"):
            return position
        position += 1 if argument in FLAGS or "=" in argument else 2
    return None


def full_name(name: str, api: str | None, auth: str | None) -> str:
    """`flow/deployment` of the deployment that `name` means: of that name, or else the flow's only one.

    Ends the command with a sentence if there is none, several, or no server to ask.
    """
    if not api:
        _give_up("No Prefect server is known here. Start one with make up, or set PREFECT_API_URL.")
    try:
        deployments = _post(api, auth, "/deployments/filter", {"limit": 200})
        flows = {flow["id"]: flow["name"] for flow in _post(api, auth, "/flows/filter", {"limit": 200})}
    except (OSError, ValueError) as error:
        _give_up(f"The Prefect server at {api} does not answer as it should ({error}). Is it up? make up starts one.")
    names = sorted(f"{flows.get(deployment['flow_id'], '?')}/{deployment['name']}" for deployment in deployments)
    found = [full for full in names if full.partition("/")[2] == name]
    found = found or [full for full in names if full.partition("/")[0] == name]
    if len(found) != 1:
        known = ", ".join(map(shown, found or names)) or "none is registered"
        _give_up(f"'{shown(name)}' is {'ambiguous' if found else 'no deployment'}. Deployments: {known}.")
    return found[0]


def _post(api: str, auth: str | None, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    sent = json.dumps(body).encode()
    try:
        return _ask(api, path, headers, sent)
    except urllib.error.HTTPError as error:
        if error.code != 403:
            raise
    client = uuid.uuid4().hex  # the server wants to know that no page of another site sends this
    token = _ask(api, f"/csrf-token?client={client}", headers)["token"]
    of_ours = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
    return _ask(api, path, headers | of_ours, sent)


def _ask(api: str, path: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    request = urllib.request.Request(api.rstrip("/") + path, body, headers)  # noqa: S310  the user's own API
    with urllib.request.urlopen(request, timeout=SECONDS) as response:  # noqa: S310
        return json.load(response)


def _give_up(sentence: str) -> NoReturn:
    print(fit_to_leave(sentence), file=sys.stderr)
    raise SystemExit(1)
