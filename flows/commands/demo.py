"""`make demo`: the flow once, by hand, with embedded defaults, and what came out of it in a table.

python -m flows.commands.demo [--preset demo] [--set data.images=4096] [--seed 0] [--processes 2]
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flows.commands.command import take_values, values_of

# Prefect's own temporary server, in this project's folder; nothing of the user's profile is read or written.
EMBEDDED = {
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_PLUGINS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
}
WARNING = "!" * 100


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is none: it must be a whole number from 0 to 2^63 - 1")
    return int(text)


def main() -> int:
    """Run the flow and print its report. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    take_values(parser, "replace a value of the recipe")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--source", default="eurosat", help="eurosat, generated, or the path of an archive")
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    overrides = values_of(parser, arguments)

    # As `run_command` does; but that imports Prefect, which reads its settings from the environment, before all is set here.
    from diffusion.errors import UserError

    try:
        return _demo(arguments, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    from diffusion.settings import reach_loopback_directly, settings
    from diffusion.trust.private import use_private_home
    from diffusion.trust.redaction import redact_logs

    environment = settings()
    database = environment.home / "prefect" / "prefect.db"
    os.environ.update(EMBEDDED)
    os.environ.pop("PREFECT_API_URL", None)
    reach_loopback_directly()
    os.environ["PREFECT_HOME"] = str(database.parent)
    os.environ.setdefault("MPLCONFIGDIR", str(environment.home / "matplotlib"))
    redact_logs()
    use_private_home(environment.home)
    database.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(_server_secrets(environment.home, database))

    from flows.prefect_database import make_prefect_current
    from flows.stopwatch import stopwatch

    with stopwatch.part("imports"):
        from diffusion.tracking.experiment import open_tracking
        from flows.checks import check_request
        from flows.request import TrainingRequest
        from flows.tasks.report import Report
        from flows.train_diffusion import train_diffusion
    # The flow checks all this as well, but only once its server is up.
    request = TrainingRequest(
        preset=arguments.preset, overrides=overrides, seed=arguments.seed, processes=arguments.processes
    )
    check_request(request)
    # The first databases take seconds to make. An error of what is done meanwhile is told at once.
    made = ThreadPoolExecutor(1).submit(make_prefect_current, database)
    open_tracking(environment)
    with stopwatch.part("ingest"):
        source = _source_or_generated(arguments.source)
    made.result()
    print("Starting Prefect's own temporary server", file=sys.stderr, flush=True)
    report = train_diffusion(
        preset=arguments.preset,
        overrides=overrides,
        seed=arguments.seed,
        source=source,
        processes=arguments.processes,
    )
    assert isinstance(report, Report)
    _print_table(report.rows)
    parts = stopwatch.parts()
    total, own = parts["total"], parts["flow's own"]
    print("\ntime: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()))
    print(f"The flow's own share of it is {own / total:.0%}: Prefect, MLflow, registration, start and end.")
    print(
        "\nmake up    opens Prefect and MLflow on what is here: the flow run, metrics, sample grids as a series, model versions"
    )
    return 0


def _server_secrets(home: Path, database: Path) -> dict[str, str]:
    """Settings of the temporary server: a password for this run alone, since it opens the database of `make up` as well."""
    import secrets

    from flows.keyring import KEY, encryption_key

    stack = home / "stack"
    stack.mkdir(exist_ok=True)
    password = f"demo:{secrets.token_urlsafe(18)}"
    found = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
        "PREFECT_SERVER_API_AUTH_STRING": password,
        "PREFECT_API_AUTH_STRING": password,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "http://127.0.0.1",  # no page is open to it: it has none of its own
    }
    # A server of an earlier version that still runs would not find the key that is taken out of its database.
    if (stack / KEY).exists() or not (stack / "prefect-server.pid").exists():
        found["PREFECT_SERVER_ENCRYPTION_KEY"] = encryption_key(stack, database)
    return found


def _source_or_generated(source: str) -> str:
    """The demo alone may go on without EuroSAT, when no archive is given and none can be downloaded; and says so."""
    from diffusion.data.sources.find import EUROSAT, GENERATED, find_archive
    from diffusion.errors import DataError
    from diffusion.settings import settings

    if source != EUROSAT or settings().archive is not None:
        find_archive(source, settings())
        return source
    try:
        find_archive(source, settings(), _print_download)
    except DataError as error:
        print(f"{error}\n\n{WARNING}", file=sys.stderr)
        print(
            "NOT EUROSAT: no archive is here and none can be downloaded, so this demo runs on generated patches.",
            file=sys.stderr,
        )
        print(f"Its figures and pictures say nothing about satellite images.\n{WARNING}\n", file=sys.stderr, flush=True)
        return GENERATED
    return source


def _print_download(done: int, total: int | None) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\r" if sys.stderr.isatty() else "\n"
        print(
            f"Downloading EuroSAT: {done / 1e6:.0f} of {(total or 0) / 1e6:.0f} MB",
            file=sys.stderr,
            end=end,
            flush=True,
        )


def _print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print()
    for label, text in rows.items():
        print(f"{label:>{width}}  {text}")


if __name__ == "__main__":
    sys.exit(main())
