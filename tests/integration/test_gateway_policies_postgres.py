"""The store of policies on PostgreSQL: the same document back, and one winner among many writers."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted
from agentic_flow.core.sql import SqlDatabase, execute
from agentic_flow.gateway.policies import GatewayPolicies
from agentic_flow.gateway.policy_store import TABLES, PolicyStore, PolicyWatch
from postgres_server import new_database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

POLICIES = GatewayPolicies.model_validate(
    {"aliases": {"fast": "haiku"}, "budgets": [{"scope": "key", "limit_usd": 0.1}], "quality": {"haiku": 0.7}}
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


def opened(url: str) -> SqlDatabase:
    database = SqlDatabase(
        url, Path("unused"), name="gateway database", setting="gateway.database_url", create=TABLES
    )
    database.create()
    return database


@pytest.fixture
def database(server: str) -> Generator[SqlDatabase]:
    database = opened(new_database(server, name=None))
    yield database
    database.close()


def test_versions_come_back_as_they_were_stored(database: SqlDatabase) -> None:
    """Catches types that PostgreSQL returns otherwise, a digest that depends on them, and unseen damage."""
    store = PolicyStore(database)
    assert store.current().version == 0
    assert store.put(POLICIES, expected_version=0, by="ada", reason="first") == 1
    assert store.put(GatewayPolicies(), expected_version=1, by="bob", reason="none") == 2
    assert store.get(1).policies == POLICIES
    assert [change.version for change in store.history(10)] == [2, 1]
    assert store.current().policies == GatewayPolicies()
    with database.transaction() as connection:
        execute(connection, "UPDATE gw_policies SET reason = 'another' WHERE version = 2")
    with pytest.raises(DataCorrupted, match="checksum"):
        store.current()


def test_of_many_writers_one_wins(database: SqlDatabase) -> None:
    """Catches two gateways that both store version 1, or a loser that is told of a broken database."""
    outcomes: list[object] = []
    gate = threading.Barrier(8)

    def race(number: int) -> None:
        own = opened(database.url)
        try:
            gate.wait()
            outcomes.append(PolicyStore(own).put(POLICIES, expected_version=0, by=f"w{number}", reason="r"))
        except AgenticFlowError as error:
            outcomes.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(1) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7
    assert len(PolicyStore(database).history(10)) == 1


async def test_a_watch_sees_what_another_gateway_stored(database: SqlDatabase) -> None:
    """Catches a second gateway on the same database that keeps to its old policies."""
    watch = PolicyWatch(PolicyStore(database))
    await watch.start()
    other = opened(database.url)
    PolicyStore(other).put(POLICIES, expected_version=0, by="ada", reason="first")
    other.close()
    await watch.refresh()
    assert (watch.version, watch.policies) == (1, POLICIES)
    await watch.close()
