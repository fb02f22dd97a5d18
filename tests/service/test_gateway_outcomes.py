"""The log of outcomes on real databases: groups, bounds, the wall between tenants, erasure, trouble."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from agentic_flow.core.errors import Unavailable
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.routing.outcomes import TABLES, Outcome, OutcomeLog
from postgres_server import new_database, postgres_server

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server() -> Generator[str]:
    """A PostgreSQL of this module's own."""
    # Outside of pytest's folder, whose permissions another run of pytest may tighten meanwhile.
    with tempfile.TemporaryDirectory(prefix="af") as folder, postgres_server(Path(folder)) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[SqlDatabase]:
    """An empty gateway database of either kind."""
    url = new_database(request.getfixturevalue("server")) if request.param == "postgresql" else None
    made = opened(tmp_path, url)
    made.create()
    yield made
    made.close()


def opened(folder: Path, url: str | None = None) -> SqlDatabase:
    file = folder / "gateway.db"
    return SqlDatabase(url, file, name="gateway database", setting="gateway.database_url", create=TABLES)


def outcome(at_s: float, tenant: str = "acme", **fields: object) -> Outcome:
    values: dict[str, object] = {
        "at_s": at_s,
        "tenant": tenant,
        "embedding": b"\x00\x3c" * 256,
        "provider": "p",
        "model": "m",
        "propensity": 0.95,
        "verdict": 1.0,
        "cost_nano_usd": 12_000,
        "latency_s": 0.5,
        "tries_before": 1,
    }
    return Outcome(**{**values, **fields})  # type: ignore[arg-type]


class Instant:
    """A clock whose pauses are over at once; it stands at a moment after all outcomes here."""

    def __init__(self, now_s: float = 10_000.0) -> None:
        self.now_s = now_s
        self.slept = asyncio.Event()

    def time_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(0)
        self.slept.set()


async def test_what_was_added_comes_back_newest_first(database: SqlDatabase) -> None:
    """Catches a column that does not survive the database, and an order that is not time's."""
    log = OutcomeLog(database, clock=Instant())
    added = [outcome(float(at_s), cost_nano_usd=None if at_s == 2 else at_s) for at_s in (1, 3, 2)]
    for one in added:
        log.add(one)
    await log.flush()
    assert await log.recent("acme", 10) == [added[1], added[2], added[0]]
    assert await log.recent("acme", 1) == [added[1]]


async def test_the_background_task_writes_and_closing_writes_the_rest(tmp_path: Path) -> None:
    """Catches outcomes that stay in memory for ever, and those lost at an orderly end."""
    database = opened(tmp_path)
    database.create()
    clock = Instant()
    log = OutcomeLog(database, clock=clock)
    log.start()
    log.start()
    log.add(outcome(1.0))
    await clock.slept.wait()
    while not await log.recent("acme", 10):
        await asyncio.sleep(0)
    log.add(outcome(2.0))
    await log.close()
    log.add(outcome(3.0))
    assert [one.at_s for one in await log.recent("acme", 10)] == [2.0, 1.0]
    database.close()


async def test_tenants_are_never_mixed_and_erased_alone(database: SqlDatabase) -> None:
    """Catches one tenant's outcomes in another's log, and an erasure that leaves some or takes others'."""
    log = OutcomeLog(database, clock=Instant())
    for at_s in range(5):
        log.add(outcome(float(at_s), "acme"))
        log.add(outcome(float(at_s), "other"))
    await log.flush()
    assert {one.tenant for one in await log.recent("other", 100)} == {"other"}
    log.add(outcome(9.0, "acme"))  # still waits
    log.add(outcome(9.0, "other"))
    assert await log.erase_tenant("acme") == 5
    await log.flush()
    assert await log.recent("acme", 100) == []
    assert list(await log.tenants()) == ["other"]
    assert (await log.tenants())["other"] == (6, 9.0)


async def test_count_and_age_are_bounded(database: SqlDatabase) -> None:
    """Catches a log that grows without end, also where many outcomes share a time stamp."""
    log = OutcomeLog(database, per_tenant_max=10, age_max_s=5000.0, clock=Instant())
    log.add(outcome(4000.0, "old"))
    log.add(outcome(6000.0, "new"))
    for _ in range(35):
        log.add(outcome(7000.0, "many"))
    await log.flush()
    kept = await log.tenants()
    assert "old" not in kept
    assert kept["new"].outcomes == 1
    assert kept["many"].outcomes == 10


async def test_a_full_queue_drops_and_counts(database: SqlDatabase) -> None:
    """Catches a queue that eats the memory while the database is slow, or an `add` that waits."""
    log = OutcomeLog(database, queue_max=3, clock=Instant())
    for at_s in range(5):
        log.add(outcome(float(at_s)))
    assert log.dropped == 2
    await log.flush()
    assert len(await log.recent("acme", 10)) == 3


async def test_trouble_with_the_database_loses_nothing_that_waits(tmp_path: Path) -> None:
    """Catches a group that is forgotten because its transaction failed."""
    file = tmp_path / "folder"
    file.write_text("in the way")
    database = opened(file)
    log = OutcomeLog(database, clock=Instant())
    log.add(outcome(1.0))
    with pytest.raises(Unavailable):
        await log.flush()
    file.unlink()
    database.create()
    await log.flush()
    assert len(await log.recent("acme", 10)) == 1
    database.close()


async def test_two_workers_share_a_log(database: SqlDatabase) -> None:
    """Catches ids that two workers give to different outcomes of one moment."""
    first, second = OutcomeLog(database, clock=Instant()), OutcomeLog(database, clock=Instant())
    for log in (first, second):
        for _ in range(20):
            log.add(outcome(1.0))
    await asyncio.gather(first.flush(), second.flush())
    assert len(await first.recent("acme", 100)) == 40
