"""Create and migrate the sqlite database of the project's Prefect server before the server starts.

The server itself would migrate the database in place. If it was killed meanwhile, it could never start again.
"""

import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from pipeline.core.errors import TemporaryError
from pipeline.core.sqlite import sqlite_path
from pipeline.tracking.sqlite_store import PREFECT, ensure_store

# if both are set, Prefect uses the first one
URL_VARIABLES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")


def ensure_database(environment: Mapping[str, str]) -> None:
    """Create or migrate the database that a server with this environment would use, if it is a sqlite file.

    Raises what `pipeline.tracking.sqlite_store.ensure_store` raises.
    """
    from prefect.settings import PREFECT_API_DATABASE_MIGRATE_ON_START  # noqa: PLC0415  # see database_path

    path = database_path(environment)
    if path and PREFECT_API_DATABASE_MIGRATE_ON_START.value():
        ensure_store(path, tool=PREFECT, migrate=partial(_migrate, environment=environment))


def database_path(environment: Mapping[str, str]) -> Path | None:
    """Return the sqlite file that a server with this environment would use, or None where it uses another database."""
    from prefect.settings import (  # noqa: PLC0415  # importing it takes a second; `make stop` does not need it
        PREFECT_API_DATABASE_CONNECTION_URL,
        PREFECT_HOME,
        temporary_settings,
    )

    with temporary_settings({PREFECT_HOME: Path(environment["PREFECT_HOME"])}):
        url = next((environment[name] for name in URL_VARIABLES if environment.get(name)), None)
        return sqlite_path(url or PREFECT_API_DATABASE_CONNECTION_URL.value())


def _migrate(copy: Path, lock: int, *, environment: Mapping[str, str]) -> None:
    """Migrate a database, or an empty file, to the schema of the installed Prefect.

    Raises RuntimeError with the last error that Prefect prints, TemporaryError where a signal ended it.
    """
    if not copy.stat().st_size:  # by this file, Prefect would believe that the new database has its block types already
        (Path(environment["PREFECT_HOME"]) / "memo_store.toml").unlink(missing_ok=True)
    url = f"sqlite+aiosqlite:///{copy.name}"  # a relative path, as a `?` in the project's path would end the name
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"],
        cwd=copy.parent,
        pass_fds=[lock],
        env={**environment, **dict.fromkeys(URL_VARIABLES, url), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise TemporaryError(f"the migration of Prefect's database was ended by {name}; run the same command again")
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise RuntimeError((errors or lines or [f"exit status {done.returncode}"])[-1])
