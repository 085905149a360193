"""Write the secrets of infra/compose.yaml into infra/.env, each drawn anew: `python infra/make_secrets.py`. None is replaced."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

from diffusion.trust.private import write_private

ENV = Path(__file__).resolve().parent / ".env"
EXAMPLE = ENV.with_name("example.env")


def main() -> None:
    """One value for each name of example.env, in a file that only its owner can read."""
    if ENV.exists():
        raise SystemExit(
            f"{ENV} is there already: its secrets are in use. Move it away first if you mean to change them all."
        )
    names = [
        line.partition("=")[0]
        for line in EXAMPLE.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    write_private(ENV, "".join(f"{name}={_secret(name)}\n" for name in names))
    print(f"wrote {len(names)} secrets to {ENV}")


def _secret(name: str) -> str:
    if name == "PREFECT_ENCRYPTION_KEY":  # of the form that Fernet wants
        return base64.urlsafe_b64encode(os.urandom(32)).decode()
    return secrets.token_urlsafe(24)  # nothing in it that an address would have to quote


if __name__ == "__main__":
    main()
