"""The usage ledger on a real SQLite file: nothing lost, nothing twice, sums exact, outages told."""

from __future__ import annotations

import asyncio
import math
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import LogCapture

from agentic_flow.core.errors import InvalidInput, Unavailable
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.usage import COST_MAX_NANO_USD, TOKENS_MAX, UsageLedger, UsageRecord
from agentic_flow.gateway.usage_table import USAGE_KEYS, UsageKey, read_keys, read_moment
from usage_records import DAY_S, NOON, database, naive_table, record, records

pytestmark = pytest.mark.anyio

KEYS = st.lists(st.sampled_from(USAGE_KEYS), unique=True, max_size=4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlDatabase]:
    made = database(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlDatabase]:
    """A database for examples that clear the table themselves."""
    made = database(tmp_path_factory.mktemp("usage"))
    yield made
    made.close()


@pytest.fixture
def logs() -> LogCapture:
    capture = LogCapture()
    structlog.configure(processors=[capture])
    return capture


def events(logs: LogCapture, name: str) -> list[dict[str, object]]:
    return [dict(entry) for entry in logs.entries if entry["event"] == name]


class SetClock:
    """A clock that a test sets."""

    def __init__(self, at_s: float = NOON) -> None:
        self.at_s = at_s

    def time_s(self) -> float:
        return self.at_s

    def monotonic_s(self) -> float:
        return self.at_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(0)


@settings(max_examples=60)
@given(given_records=st.lists(records(), max_size=60), by=KEYS)
def test_tables_equal_a_naive_model(
    shared: SqlDatabase, given_records: list[UsageRecord], by: list[UsageKey]
) -> None:
    """Catches a sum, a percentile or a group that is not exactly what plain loops give."""
    with shared.transaction() as connection:
        connection.exec_driver_sql("DELETE FROM gw_usage")
    ledger = UsageLedger(shared)
    for one in given_records:
        ledger.record(one)
    asyncio.run(ledger.close())
    since_s, until_s = NOON - DAY_S / 2, NOON + DAY_S / 3
    for tenant, low, high in ((None, 0.0, math.inf), ("team-a", 0.0, 1e12), (None, since_s, until_s)):
        inside = [r for r in given_records if tenant in (None, r.tenant) and low <= r.at_s < high]
        found = ledger.table(tenant, by, low, high)
        assert {tuple(row.keys.values()): row for row in found} == naive_table(inside, by)


async def test_ten_thousand_records_of_many_threads_are_all_there(store: SqlDatabase) -> None:
    """Catches records lost or doubled between threads, groups and the close."""
    ledger = UsageLedger(store, retention_s=None)
    await ledger.start()

    def write(thread: int) -> None:
        for number in range(2500):
            ledger.record(record(request_id=f"{thread}-{number}", key=f"key-{thread}", cost_nano_usd=number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    await asyncio.gather(*(asyncio.to_thread(thread.join) for thread in threads))
    await ledger.close()
    rows = ledger.table(None, ("key",))
    assert [(row.calls, row.cost_nano_usd) for row in rows] == [(2500, sum(range(2500)))] * 4
    assert (ledger.lost, ledger.waiting, ledger.written) == (0, 0, 10_000)
    assert store.rows("SELECT COUNT(DISTINCT request_id) FROM gw_usage")[0][0] == 10_000


async def test_processes_share_one_file(store: SqlDatabase) -> None:
    """Catches writers of several processes that overwrite or block one another."""
    program = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom agentic_flow.gateway.usage import UsageLedger\n"
        "from usage_records import database, record\n"
        "async def main():\n"
        "    ledger = UsageLedger(database(Path(sys.argv[1])), retention_s=None)\n"
        "    await ledger.start()\n"
        "    for number in range(2000):\n"
        "        ledger.record(record(key=sys.argv[2], cost_nano_usd=number))\n"
        "        if number % 100 == 0: await asyncio.sleep(0)\n"
        "    await ledger.close()\n"
        "    assert ledger.lost == 0\n"
        "asyncio.run(main())\n"
    )
    assert store.file is not None
    tests = Path(__file__).parent.parent
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(store.file.parent), f"key-{n}"], cwd=tests)
        for n in range(3)
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    rows = UsageLedger(store).table("default", ("key",))
    assert {row.keys["key"]: (row.calls, row.cost_nano_usd) for row in rows} == {
        f"key-{n}": (2000, sum(range(2000))) for n in range(3)
    }


async def test_a_quiet_record_is_written_by_itself(store: SqlDatabase) -> None:
    """Catches a record that waits for company for ever, before and after the first group."""
    ledger = UsageLedger(store, retention_s=None, interval_s=0.01)
    await ledger.start()
    for number in (1, 2):
        ledger.record(record())
        while ledger.written < number:  # the test's own timeout bounds it
            await asyncio.sleep(0.005)
    assert ledger.table(None)[0].calls == 2
    await ledger.close()


async def test_a_full_group_does_not_wait(store: SqlDatabase) -> None:
    """Catches a busy worker whose records pile up until the interval is over."""
    ledger = UsageLedger(store, retention_s=None, interval_s=3600.0, group_max=50)
    await ledger.start()
    for _ in range(50):
        ledger.record(record())
    while ledger.written < 50:
        await asyncio.sleep(0.005)
    await ledger.close()


class Unheard(SqlDatabase):
    """A database whose first commit goes through, and whose connection breaks before it says so."""

    heard = False

    @contextmanager
    def transaction(self) -> Generator[Any]:
        with super().transaction() as connection:
            yield connection
        if not self.heard:
            self.heard = True
            raise Unavailable("the connection broke")


async def test_a_group_is_written_once_when_its_commit_was_not_heard(store: SqlDatabase) -> None:
    """Catches doubled calls, and doubled money, after a connection that broke during the commit."""
    assert store.file is not None
    deaf = Unheard(None, store.file, name="gateway database", setting="gateway.database_url", create=())
    ledger = UsageLedger(deaf)
    ledger.record(record())
    ledger.record(record())
    with pytest.raises(Unavailable):
        await ledger.flush()
    assert deaf.heard
    ledger.record(record())
    await ledger.flush()
    deaf.close()
    assert UsageLedger(store).table(None)[0].calls == 3


async def test_records_wait_while_the_file_is_locked(tmp_path: Path) -> None:
    """Catches records given up because another process holds the write lock for a while."""
    store = database(tmp_path)
    ledger = UsageLedger(store, retention_s=None, interval_s=0.01)
    await ledger.start()
    with closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(700):
            ledger.record(record())
        await asyncio.sleep(0.1)
        assert ledger.written == 0
        other.execute("ROLLBACK")
    await ledger.close()
    assert ledger.table(None)[0].calls == 700
    assert ledger.lost == 0
    store.close()


async def test_records_wait_while_the_file_is_away(tmp_path: Path, logs: LogCapture) -> None:
    """Catches writing on to a deleted file, which nobody can read, and an outage told for every group."""
    store = database(tmp_path)
    ledger = UsageLedger(store)
    ledger.record(record())
    await ledger.flush()
    store.close()
    away = tmp_path / "away"
    away.mkdir()
    for file in tmp_path.glob("gateway.db*"):
        shutil.move(file, away / file.name)
    for _ in range(3):
        ledger.record(record())
        with pytest.raises(Unavailable):
            await ledger.flush()
    assert not (tmp_path / "gateway.db").exists()
    assert len(events(logs, "usage_ledger_unavailable")) == 1
    for file in away.iterdir():
        shutil.move(file, tmp_path / file.name)
    await ledger.close()
    assert ledger.table(None)[0].calls == 4
    assert len(events(logs, "usage_ledger_recovered")) == 1
    assert not events(logs, "usage_records_lost")
    store.close()


async def test_a_replaced_file_gets_what_comes_next(tmp_path: Path) -> None:
    """Catches connections that still hold the file that was there before a restore."""
    store = database(tmp_path)
    ledger = UsageLedger(store)
    ledger.record(record())
    await ledger.flush()
    for file in tmp_path.glob("gateway.db*"):
        file.unlink()
    (tmp_path / "gateway.db").touch()
    ledger.record(record(agent="after"))
    await ledger.flush()
    with closing(sqlite3.connect(tmp_path / "gateway.db")) as other:
        assert other.execute("SELECT agent FROM gw_usage").fetchall() == [("after",)]
    store.close()


async def test_past_the_bound_the_oldest_are_lost_and_counted_once(tmp_path: Path, logs: LogCapture) -> None:
    """Catches a buffer without bound, a loss that nobody hears of, and one told with every record."""
    store = database(tmp_path)
    file = tmp_path / "gateway.db"
    file.rename(tmp_path / "moved.db")
    ledger = UsageLedger(store, pending_max=10)
    for number in range(25):
        ledger.record(record(run=str(number)))
        if number % 5 == 0:
            with pytest.raises(Unavailable):
                await ledger.flush()
    assert (ledger.lost, ledger.waiting) == (15, 10)
    (tmp_path / "moved.db").rename(file)
    await ledger.close()
    assert sorted(int(row.keys["run"]) for row in ledger.table(None, ("run",))) == list(range(15, 25))
    assert [entry["lost"] for entry in events(logs, "usage_records_lost")] == [15]
    store.close()


async def test_closing_with_the_database_away_says_what_is_lost(tmp_path: Path, logs: LogCapture) -> None:
    """Catches a shutdown that hangs, fails or keeps silent about what it could not write."""
    store = database(tmp_path)
    (tmp_path / "gateway.db").unlink()
    ledger = UsageLedger(store, retention_s=None)
    await ledger.start()
    for _ in range(7):
        ledger.record(record())
    await ledger.close()
    ledger.record(record())
    assert (ledger.lost, ledger.waiting) == (8, 0)
    assert [entry["lost"] for entry in events(logs, "usage_records_lost")] == [7]


async def test_absurd_values_do_not_stop_the_ledger(store: SqlDatabase) -> None:
    """Catches one record that no database takes, and behind which all others wait for ever."""
    ledger = UsageLedger(store)
    ledger.record(
        record(
            agent="nul\0 and half a pair \ud800",
            run="r" * 10_000,
            input_tokens=2**80,
            output_tokens=-5,
            cost_nano_usd=2**90,
            latency_s=float("nan"),
            first_token_s=float("inf"),
            at_s=float("-inf"),
        )
    )
    ledger.record(record())
    await ledger.flush()
    total = ledger.table(None)[0]
    assert total.calls == 2
    assert total.input_tokens == TOKENS_MAX + 1000
    assert total.cost_nano_usd == COST_MAX_NANO_USD + 650_000
    assert {row.keys["agent"] for row in ledger.table(None, ("agent",))} == {
        "coder",
        "nul? and half a pair ?",
    }


async def test_old_records_are_pruned_in_batches(store: SqlDatabase) -> None:
    """Catches pruning that takes too much, too little, or stops after its first batch."""
    ledger = UsageLedger(store, SetClock(NOON + 90 * DAY_S))
    for number in range(2500):
        ledger.record(record(at_s=NOON - 1 - number))
    for number in range(3):
        ledger.record(record(at_s=NOON + number))
    await ledger.flush()
    assert await asyncio.to_thread(ledger.prune) == 2500
    assert ledger.table(None)[0].calls == 3


async def test_the_background_prunes(store: SqlDatabase) -> None:
    """Catches a retention that only a person who calls `prune` would keep."""
    old = UsageLedger(store)
    old.record(record(at_s=NOON - 91 * DAY_S))
    old.record(record())
    await old.close()
    ledger = UsageLedger(store, SetClock())
    await ledger.start()
    while ledger.table(None)[0].calls > 1:
        await asyncio.sleep(0.005)
    await ledger.close()


async def test_erasing_a_tenant_takes_what_waits_too(store: SqlDatabase) -> None:
    """Catches a tenant whose last calls are written after it was erased, and neighbours erased with it."""
    ledger = UsageLedger(store)
    for number in range(1300):
        ledger.record(record(tenant="gone", key=str(number)))
    ledger.record(record(tenant="stays"))
    await ledger.flush()
    ledger.record(record(tenant="gone"))
    ledger.record(record(tenant="stays"))
    assert await asyncio.to_thread(ledger.erase_tenant, "gone") == 1301
    await ledger.close()
    assert [(row.keys["tenant"], row.calls) for row in ledger.table(None, ("tenant",))] == [("stays", 2)]


async def test_rows_come_newest_and_costliest_first(store: SqlDatabase) -> None:
    """Catches a limit that cuts off what matters most."""
    ledger = UsageLedger(store)
    for day, model, cost in ((0, "a", 5), (0, "b", 9), (1, "a", 1), (1, "c", 0)):
        ledger.record(record(at_s=NOON + day * DAY_S, model=model, cost_nano_usd=cost))
    await ledger.flush()
    rows = ledger.table(None, ("day", "model"))
    assert [(row.keys["day"][-2:], row.keys["model"]) for row in rows] == [
        ("21", "a"), ("21", "c"), ("20", "b"), ("20", "a"),
    ]  # fmt: skip
    assert [row.keys["model"] for row in ledger.table(None, ("model",), limit=1)] == ["b"]


async def test_an_unknown_cost_is_not_free(store: SqlDatabase) -> None:
    """Catches calls without a price shown as if they had cost nothing."""
    ledger = UsageLedger(store)
    ledger.record(record(model="unpriced", cost_nano_usd=None))
    ledger.record(record(model="free", cost_nano_usd=0))
    await ledger.flush()
    costs = {row.keys["model"]: row.as_json()["cost_usd"] for row in ledger.table(None, ("model",))}
    assert costs == {"unpriced": None, "free": 0.0}


async def test_wrong_questions_are_refused(store: SqlDatabase) -> None:
    """Catches words of a caller that reach the statement, and limits without bound."""
    ledger = UsageLedger(store)
    for by in (("model; DROP TABLE gw_usage",), ("model", "model")):
        with pytest.raises(InvalidInput):
            ledger.table(None, by)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        ledger.table(None, limit=0)
    with pytest.raises(InvalidInput, match="colour"):
        read_keys("model,colour")
    assert read_keys(" model, day ") == ("model", "day")


def test_moments_are_read_in_utc() -> None:
    """Catches a date that begins at another hour than the ledger's days do."""
    assert read_moment("7d", "since", NOON) == NOON - 7 * DAY_S
    assert read_moment("90m", "since", NOON) == NOON - 5400
    assert read_moment("2026-11-20", "since", 0) == NOON - DAY_S / 2
    assert read_moment("20261120", "since", 0) == NOON - DAY_S / 2
    assert read_moment("2026-11-20T13:00+01:00", "since", 0) == NOON
    assert read_moment(str(NOON), "since", 0) == NOON
    for text in ("yesterday", "", "nan", "-5", "7y", "2026-13-01", "inf"):
        with pytest.raises(InvalidInput, match="since"):
            read_moment(text, "since", NOON)
