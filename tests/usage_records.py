"""Usage records for tests, and a naive model of the tables over them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.usage import TABLES, UsageRecord
from agentic_flow.gateway.usage_table import UsageKey, UsageRow

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC).timestamp()
"""The present leaves it behind: a ledger that prunes by the system's clock takes it away some day."""
DAY_S = 86_400.0


def database(folder: Path, url: str | None = None) -> SqlDatabase:
    """An empty database with the ledger's table."""
    made = SqlDatabase(
        url,
        folder / "gateway.db",
        name="gateway database",
        setting="gateway.database_url",
        create=TABLES,
    )
    made.create()
    return made


def record(**changes: Any) -> UsageRecord:
    """A call that went well, with changes."""
    usual: dict[str, Any] = {
        "at_s": NOON,
        "request_id": "req-1",
        "tenant": "default",
        "key": "key-1",
        "agent": "coder",
        "run": "run-1",
        "provider": "openai",
        "model": "gpt-5-mini",
        "asked": "auto",
        "wire": "openai_chat",
        "input_tokens": 1000,
        "output_tokens": 200,
        "cache_read_tokens": 100,
        "cache_write_tokens": 10,
        "reasoning_tokens": 50,
        "cost_nano_usd": 650_000,
        "latency_s": 0.8,
        "first_token_s": 0.3,
        "status": "ok",
        "tries": 1,
    }
    return UsageRecord(**{**usual, **changes})


def records() -> st.SearchStrategy[UsageRecord]:
    """Any call, over three days, with few names so that groups are shared."""
    tokens = st.integers(0, 10**7)
    return st.builds(
        UsageRecord,
        at_s=st.floats(NOON - DAY_S, NOON + DAY_S),
        request_id=st.text(max_size=4),
        tenant=st.sampled_from(["default", "team-a"]),
        key=st.sampled_from(["key-1", "key-2"]),
        agent=st.sampled_from(["", "coder"]),
        run=st.sampled_from(["", "run-1"]),
        provider=st.sampled_from(["openai", "anthropic"]),
        model=st.sampled_from(["small", "large", "größte"]),
        asked=st.text(max_size=4),
        wire=st.sampled_from(["openai_chat", "anthropic_messages"]),
        input_tokens=tokens,
        output_tokens=tokens,
        cache_read_tokens=tokens,
        cache_write_tokens=tokens,
        reasoning_tokens=tokens,
        cost_nano_usd=st.none() | st.integers(0, 10**13),
        latency_s=st.floats(0, 300),
        first_token_s=st.none() | st.floats(0, 100),
        status=st.sampled_from(["ok", "ok", "ok", "cancelled", "provider_failed"]),
        tries=st.integers(0, 4),
        cached=st.booleans(),
        estimated=st.booleans(),
        streamed=st.booleans(),
    )


def keys_of(one: UsageRecord, by: Sequence[UsageKey]) -> tuple[str, ...]:
    """The group of a record."""
    # Python rounds to microseconds, and would put the last moment of an hour into the next one.
    moment = datetime.fromtimestamp(math.floor(one.at_s), UTC)
    times = {"day": moment.strftime("%Y-%m-%d"), "hour": moment.strftime("%Y-%m-%dT%H:00Z")}
    return tuple(times[key] if key in times else getattr(one, key) for key in by)


def naive_table(given: Iterable[UsageRecord], by: Sequence[UsageKey]) -> dict[tuple[str, ...], UsageRow]:
    """The table as plain loops make it."""
    groups: dict[tuple[str, ...], list[UsageRecord]] = defaultdict(list)
    for one in given:
        groups[keys_of(one, by)].append(one)
    return {keys: _row(dict(zip(by, keys, strict=True)), group) for keys, group in groups.items()}


def _row(keys: dict[str, str], group: list[UsageRecord]) -> UsageRow:
    answered = [one for one in group if one.status == "ok"]
    latencies = sorted(one.latency_s for one in answered)
    first = sorted(one.first_token_s for one in answered if one.first_token_s is not None)
    return UsageRow(
        keys=keys,
        calls=len(group),
        errors=sum(one.status not in ("ok", "cancelled") for one in group),
        cancelled=sum(one.status == "cancelled" for one in group),
        cached=sum(one.cached for one in group),
        estimated=sum(one.estimated for one in group),
        unpriced=sum(one.cost_nano_usd is None for one in group),
        input_tokens=sum(one.input_tokens for one in group),
        output_tokens=sum(one.output_tokens for one in group),
        cache_read_tokens=sum(one.cache_read_tokens for one in group),
        cache_write_tokens=sum(one.cache_write_tokens for one in group),
        reasoning_tokens=sum(one.reasoning_tokens for one in group),
        cost_nano_usd=sum(one.cost_nano_usd or 0 for one in group),
        latency_p50_s=nearest_rank(latencies, 50),
        latency_p95_s=nearest_rank(latencies, 95),
        first_token_p50_s=nearest_rank(first, 50),
        first_token_p95_s=nearest_rank(first, 95),
    )


def nearest_rank(ordered: list[float], percent: int) -> float | None:
    """The smallest value that at least `percent` of the values do not exceed."""
    for index, value in enumerate(ordered, start=1):
        if index * 100 >= percent * len(ordered):
            return value
    return None
