"""The usage ledger on PostgreSQL: the same sums, records that outlive a stopped server."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import Generator
from pathlib import Path

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import Unavailable
from agentic_flow.gateway.usage import UsageLedger, UsageRecord
from agentic_flow.gateway.usage_table import USAGE_KEYS, UsageKey
from postgres_server import Cluster, new_database, postgres_server
from usage_records import DAY_S, NOON, database, naive_table, record, records

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(300)]

NOWHERE = Path("unused")
KEYS = st.lists(st.sampled_from(USAGE_KEYS), unique=True, max_size=4)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server of this module's own."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(scope="module")
def shared(server: str) -> str:
    """A database for examples that clear the table themselves."""
    return new_database(server, name=f"usage_{secrets.token_hex(4)}")


@settings(max_examples=40)
@given(given_records=st.lists(records(), max_size=60), by=KEYS)
def test_tables_equal_a_naive_model(
    shared: str, given_records: list[UsageRecord], by: list[UsageKey]
) -> None:
    """Catches a sum, percentile or group that PostgreSQL makes otherwise than SQLite and plain loops."""
    store = database(NOWHERE, shared)
    with psycopg.connect(shared, autocommit=True) as connection:
        connection.execute("TRUNCATE gw_usage")
    ledger = UsageLedger(store)
    for one in given_records:
        ledger.record(one)
    asyncio.run(ledger.close())
    since_s, until_s = NOON - DAY_S / 2, NOON + DAY_S / 3
    for tenant, low, high in ((None, 0.0, float("inf")), ("team-a", 0.0, 1e12), (None, since_s, until_s)):
        inside = [r for r in given_records if tenant in (None, r.tenant) and low <= r.at_s < high]
        found = ledger.table(tenant, by, low, high)
        assert {tuple(row.keys.values()): row for row in found} == naive_table(inside, by)
    store.close()


async def test_two_ledgers_write_and_forget_together(server: str) -> None:
    """Catches workers that collide, absurd values that PostgreSQL refuses, and deletions that miss rows."""
    url = new_database(server)
    stores = [database(NOWHERE, url) for _ in range(2)]
    ledgers = [UsageLedger(store, retention_s=None) for store in stores]
    for ledger in ledgers:
        await ledger.start()
    for number in range(5000):
        for ledger in ledgers:
            ledger.record(record(tenant=f"team-{number % 2}", cost_nano_usd=number))
    ledgers[0].record(record(tenant="odd", agent="nul\0\ud800", input_tokens=2**80, latency_s=float("nan")))
    await asyncio.gather(*(ledger.close() for ledger in ledgers))
    assert [ledger.lost for ledger in ledgers] == [0, 0]
    total = ledgers[1].table(None)[0]
    assert (total.calls, total.cost_nano_usd) == (10_001, 2 * sum(range(5000)) + 650_000)
    assert ledgers[0].erase_tenant("team-0") == 5000
    assert ledgers[0].prune(0.0) == 5001
    assert ledgers[0].table(None) == []
    for store in stores:
        store.close()


async def test_records_wait_while_the_server_is_down() -> None:
    """Catches records lost, or doubled, because the server was away or crashed under a pooled connection."""
    with tempfile.TemporaryDirectory(prefix="usage") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder))
        cluster.start()
        store = database(NOWHERE, cluster.url)
        ledger = UsageLedger(store, retention_s=None, interval_s=0.01)
        await ledger.start()
        for _ in range(10):
            ledger.record(record())
        await ledger.flush()
        await asyncio.to_thread(cluster.stop, "immediate")
        for _ in range(1200):
            ledger.record(record())
        with pytest.raises(Unavailable):
            await ledger.flush()
        assert ledger.waiting == 1200
        await asyncio.to_thread(cluster.start)
        await ledger.close()
        assert ledger.lost == 0
        assert ledger.table(None)[0].calls == 1210
        store.close()
        await asyncio.to_thread(cluster.stop)
