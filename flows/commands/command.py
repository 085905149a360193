"""What commands share: values on the command line, and how one begins and ends."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.settings import Settings


def take_values(parser: argparse.ArgumentParser, help: str) -> None:
    """Have a command take `--set KEY=VALUE`, several times."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help)


def values_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, str]:
    """What was set; ends the command with a sentence if that is no KEY=VALUE."""
    for item in arguments.set:
        if "=" not in item:
            parser.error(f"--set takes KEY=VALUE, not '{item}'")
    return dict(item.split("=", 1) for item in arguments.set)


def run_command(body: Callable[[Settings], int]) -> int:
    """The exit code of a command: its own, or 1 and a sentence for what the user has to change. Its files are private."""
    from diffusion.errors import UserError
    from diffusion.settings import settings
    from diffusion.trust.private import use_private_home
    from diffusion.trust.redaction import redact_logs
    from flows.plugins.credentials import use_block

    try:
        environment = settings()
        os.environ.setdefault("MPLCONFIGDIR", str(environment.home / "matplotlib"))
        use_private_home(environment.home)
        redact_logs()
        use_block(environment.s3_block)
        return body(environment)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
