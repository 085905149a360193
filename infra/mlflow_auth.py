"""MLflow's own users: where its server finds them, and that their password is the one that is asked for.

`python infra/mlflow_auth.py` does both in a container, with MLFLOW_AUTH_DATABASE_URI, MLFLOW_AUTH_ADMIN_PASSWORD and
MLFLOW_AUTH_CONFIG_PATH of the environment.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

TEMPLATE = Path(__file__).resolve().parents[1] / "mlflow" / "server.ini"


def write_settings(path: Path, database: str) -> None:
    """Write what MLFLOW_AUTH_CONFIG_PATH names."""
    path.write_text(TEMPLATE.read_text(encoding="utf-8").replace("= DATABASE_URI", f"= {database}"), encoding="utf-8")


def open_users(database: str) -> SqlAlchemyStore:
    """MLflow's own users, in a database that is brought to what the installed MLflow needs."""
    with warnings.catch_warnings():  # of what MLflow itself imports: nothing that a user could do about
        warnings.simplefilter("ignore")
        from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    users = SqlAlchemyStore()
    users.init_db(database)
    return users


def upgrade(path: Path) -> None:
    """Bring an SQLite file of users, empty or of an earlier version, to what the installed MLflow needs."""
    open_users(f"sqlite:///{path}").engine.dispose()


def follow_password(database: str, password: str) -> None:
    """Have the users, where there are any, know the password: MLflow keeps the one that its database was made with."""
    users = open_users(database)
    if users.has_user("admin") and not users.authenticate_user("admin", password):
        users.update_user("admin", password)
    users.engine.dispose()


if __name__ == "__main__":
    os.umask(0o077)
    write_settings(Path(os.environ["MLFLOW_AUTH_CONFIG_PATH"]), os.environ["MLFLOW_AUTH_DATABASE_URI"])
    follow_password(os.environ["MLFLOW_AUTH_DATABASE_URI"], os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
