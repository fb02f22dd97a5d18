"""Tables of the usage ledger: sums, and exact percentiles, in one statement for SQLite and PostgreSQL.

Sums of money are of whole nano-USD, so they are exact. Percentiles are the nearest rank (the smallest value
that at least p percent of the values do not exceed), computed over every call of a group, not from a sketch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Self, cast, get_args

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.sql import SqlDatabase

UsageKey = Literal["model", "provider", "agent", "run", "key", "tenant", "day", "hour", "status"]
USAGE_KEYS: tuple[UsageKey, ...] = get_args(UsageKey)
LIMIT_MAX = 10_000
EVERYBODY = "*"
"""Where people write the name of a tenant."""
NANO = 1_000_000_000

# `hour` counts the hours since 1970; both databases divide whole numbers without a rest.
_EXPRESSIONS: dict[UsageKey, str] = {
    "model": "model",
    "provider": "provider",
    "agent": "agent",
    "run": "run",
    "key": "key_id",
    "tenant": "tenant",
    "day": "hour / 24",
    "hour": "hour",
    "status": "status",
}
_TIMES: tuple[UsageKey, ...] = ("day", "hour")
NUMBERS = (
    "calls", "errors", "cancelled", "cached", "input_tokens", "output_tokens", "cache_read_tokens",
    "cache_write_tokens", "reasoning_tokens", "estimated_calls", "cost_usd", "cost_nano_usd",
    "unpriced_calls", "latency_p50_s", "latency_p95_s", "first_token_p50_s", "first_token_p95_s",
)  # fmt: skip
"""What a row shows beside its keys, in this order."""
_UNITS_S = {"m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 7 * 86_400.0}
_AGO = re.compile(r"(\d{1,6})([mhdw])")


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What the calls of one group add up to.

    Args:
        keys: The group: names and values in the order asked for. Days and hours are of UTC.
        errors: Calls that ended with an error; `cancelled` ones are not among them.
        cached: Calls that the response cache answered.
        estimated: Calls whose tokens were counted here because the provider billed none.
        unpriced: Calls whose cost is not known; they are not part of the cost.
        cost_nano_usd: Sum of the known costs.
        latency_p50_s, latency_p95_s: Of the calls that succeeded; None when none did.
        first_token_p50_s, first_token_p95_s: Of those that were streamed.
    """

    keys: dict[str, str]
    calls: int
    errors: int
    cancelled: int
    cached: int
    estimated: int
    unpriced: int
    input_tokens: int
    output_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    cost_nano_usd: int
    latency_p50_s: float | None
    latency_p95_s: float | None
    first_token_p50_s: float | None
    first_token_p95_s: float | None

    @property
    def cost_usd(self) -> float | None:
        """The sum in USD; None when no call's cost is known."""
        return None if self.unpriced == self.calls else self.cost_nano_usd / NANO

    def as_json(self) -> dict[str, Any]:
        """The row as the route and the command line show it: the keys first, then the numbers."""
        numbers = (
            self.calls, self.errors, self.cancelled, self.cached, self.input_tokens, self.output_tokens,
            self.cache_read_tokens, self.cache_write_tokens, self.reasoning_tokens, self.estimated,
            self.cost_usd, self.cost_nano_usd, self.unpriced, self.latency_p50_s, self.latency_p95_s,
            self.first_token_p50_s, self.first_token_p95_s,
        )  # fmt: skip
        return {**self.keys, **dict(zip(NUMBERS, numbers, strict=True))}

    @classmethod
    def from_json(cls, shown: Mapping[str, Any], by: Sequence[UsageKey]) -> Self:
        """The row that `as_json` wrote. Raises KeyError for one that it did not."""
        numbers = {name: shown[name] for name in NUMBERS if name != "cost_usd"}
        estimated, unpriced = numbers.pop("estimated_calls"), numbers.pop("unpriced_calls")
        keys = {key: str(shown[key]) for key in by}
        return cls(keys=keys, estimated=estimated, unpriced=unpriced, **numbers)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """A table with what people ask next.

    Args:
        totals: Of all groups, those left out included; None when there was no call.
        truncated: Whether groups were left out.
    """

    tenant: str | None
    since_s: float
    until_s: float
    by: tuple[UsageKey, ...]
    rows: list[UsageRow]
    totals: UsageRow | None
    truncated: bool

    def as_json(self) -> dict[str, Any]:
        """As the route and `--json` give it; the tenant `*` is everybody."""
        return {
            "tenant": EVERYBODY if self.tenant is None else self.tenant,
            "since_s": self.since_s,
            "until_s": self.until_s,
            "by": list(self.by),
            "rows": [row.as_json() for row in self.rows],
            "totals": None if self.totals is None else self.totals.as_json(),
            "truncated": self.truncated,
        }

    @classmethod
    def from_json(cls, shown: Mapping[str, Any]) -> Self:
        """The report that `as_json` wrote.

        Raises:
            KeyError, TypeError, InvalidInput: it wrote something else.
        """
        by = read_keys(",".join(shown["by"]))
        totals = shown["totals"]
        return cls(
            tenant=None if shown["tenant"] == EVERYBODY else str(shown["tenant"]),
            since_s=float(shown["since_s"]),
            until_s=float(shown["until_s"]),
            by=by,
            rows=[UsageRow.from_json(row, by) for row in shown["rows"]],
            totals=None if totals is None else UsageRow.from_json(totals, ()),
            truncated=bool(shown["truncated"]),
        )


def usage_report(
    database: SqlDatabase,
    tenant: str | None,
    by: Sequence[UsageKey],
    since_s: float,
    until_s: float,
    limit: int,
) -> UsageReport:
    """At most `limit` rows and the totals, which are read one after the other. Blocks.

    Raises:
        InvalidInput: the span is empty; or as `UsageLedger.table`.
        Unavailable: the database cannot be read.
    """
    if since_s >= until_s:
        raise InvalidInput(
            f"the span from {_utc(since_s)!r} to {_utc(until_s)!r} is empty", hint="it begins before it ends"
        )
    rows = usage_table(database, tenant, by, since_s, until_s, min(limit + 1, LIMIT_MAX))
    totals = usage_table(database, tenant, (), since_s, until_s, 1)
    return UsageReport(
        tenant=tenant,
        since_s=since_s,
        until_s=until_s,
        by=tuple(by),
        rows=rows[:limit],
        totals=totals[0] if totals else None,
        truncated=len(rows) > limit,
    )


def _utc(at_s: float) -> str:
    try:
        return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return repr(at_s)


def usage_table(
    database: SqlDatabase,
    tenant: str | None,
    by: Sequence[UsageKey],
    since_s: float,
    until_s: float,
    limit: int,
) -> list[UsageRow]:
    """See `UsageLedger.table`."""
    check_keys(by)
    if not 1 <= limit <= LIMIT_MAX:
        raise InvalidInput(f"a limit of {limit!r} rows is out of range", hint=f"1 to {LIMIT_MAX}")
    bindings: dict[str, Any] = {
        "since_s": max(since_s, 0.0),
        # Infinity is not the same in every driver.
        "until_s": min(until_s, 1e15),
        "row_limit": limit,
    }
    condition = "at_s >= :since_s AND at_s < :until_s"
    if tenant is not None:
        condition += " AND tenant = :tenant"
        bindings["tenant"] = tenant
    found = database.rows(_statement(by, condition), **bindings)
    return [_usage_row(by, row) for row in found if row[len(by)]]


def _statement(by: Sequence[UsageKey], condition: str) -> str:
    names = [f"key_{number}" for number in range(len(by))]
    chosen = "".join(f"{_EXPRESSIONS[key]} AS {name}, " for key, name in zip(by, names, strict=True))
    group = "".join(f"{name}, " for name in names)
    order = [f"{name} DESC" for key, name in zip(by, names, strict=True) if key in _TIMES]
    order += ["COALESCE(SUM(cost_nano_usd), 0) DESC", "COUNT(*) DESC", *names]

    def percentile(value: str, percent: int) -> str:
        rank = f"({value}_count * {percent} + 99) / 100"
        return f"MAX(CASE WHEN answered = 1 AND {value}_rank = {rank} THEN {value} END)"

    def count(test: str) -> str:
        return f"SUM(CASE WHEN {test} THEN 1 ELSE 0 END)"

    return f"""
        WITH chosen AS (
            SELECT {chosen} latency_s, first_token_s, status, cached, estimated, cost_nano_usd, input_tokens,
                output_tokens, cache_read_tokens, cache_write_tokens, reasoning_tokens,
                CASE WHEN status = 'ok' THEN 1 ELSE 0 END AS answered,
                CASE WHEN first_token_s IS NULL THEN 0 ELSE 1 END AS timed
            FROM gw_usage WHERE {condition}
        ), ranked AS (
            SELECT chosen.*,
                ROW_NUMBER() OVER (PARTITION BY {group} answered ORDER BY latency_s) AS latency_s_rank,
                COUNT(*) OVER (PARTITION BY {group} answered) AS latency_s_count,
                ROW_NUMBER() OVER (PARTITION BY {group} answered, timed ORDER BY first_token_s)
                    AS first_token_s_rank,
                COUNT(*) OVER (PARTITION BY {group} answered, timed) AS first_token_s_count
            FROM chosen
        )
        SELECT {group} COUNT(*), {count("status NOT IN ('ok', 'cancelled')")},
            {count("status = 'cancelled'")}, SUM(cached), SUM(estimated), {count("cost_nano_usd IS NULL")},
            SUM(input_tokens), SUM(output_tokens), SUM(cache_read_tokens), SUM(cache_write_tokens),
            SUM(reasoning_tokens), COALESCE(SUM(cost_nano_usd), 0),
            {percentile("latency_s", 50)}, {percentile("latency_s", 95)},
            {percentile("first_token_s", 50)}, {percentile("first_token_s", 95)}
        FROM ranked {"GROUP BY " + ", ".join(names) if names else ""}
        ORDER BY {", ".join(order)} LIMIT :row_limit
    """  # noqa: S608 - names of columns, chosen from the tables above


def _usage_row(by: Sequence[UsageKey], row: Sequence[Any]) -> UsageRow:
    keys = {key: _shown(key, value) for key, value in zip(by, row[: len(by)], strict=True)}
    numbers = row[len(by) :]
    # PostgreSQL sums 64-bit numbers into decimals.
    calls, errors, cancelled, cached, estimated, unpriced, *tokens_and_cost = (int(n) for n in numbers[:12])
    taken_in, given_out, read, written, reasoning, cost = tokens_and_cost
    return UsageRow(
        keys, calls, errors, cancelled, cached, estimated, unpriced, taken_in, given_out, read, written,
        reasoning, cost, *numbers[12:],
    )  # fmt: skip


def _shown(key: UsageKey, value: Any) -> str:
    if key == "day":
        return datetime.fromtimestamp(int(value) * 86_400, UTC).strftime("%Y-%m-%d")
    if key == "hour":
        return datetime.fromtimestamp(int(value) * 3600, UTC).strftime("%Y-%m-%dT%H:00Z")
    return str(value)


# What callers write


def check_keys(by: Sequence[str]) -> None:
    """Raise InvalidInput for an unknown or repeated key."""
    for key in by:
        if key not in USAGE_KEYS:
            raise InvalidInput(f"{key!r} is nothing to group by", hint=f"use {', '.join(USAGE_KEYS)}")
    if len(set(by)) != len(by):
        raise InvalidInput(f"{','.join(by)!r} names a key twice", hint="name each once")


def read_keys(text: str) -> tuple[UsageKey, ...]:
    """The keys of `model,day`. Raises as `check_keys`."""
    keys = tuple(part.strip() for part in text.split(",") if part.strip())
    check_keys(keys)
    return cast(tuple[UsageKey, ...], keys)


def read_moment(text: str, what: str, now_s: float) -> float:
    """A point in time as Unix seconds: `7d` ago, a date or time in ISO 8601 (UTC unless it says otherwise),
    or Unix seconds.

    Raises:
        InvalidInput: it is none of these.
    """
    ago = _AGO.fullmatch(text)
    if ago is not None:
        return max(0.0, now_s - int(ago[1]) * _UNITS_S[ago[2]])
    try:
        # Years look like small numbers of seconds; nobody means the first hours of 1970.
        seconds = float(text) if not text.isdigit() or len(text) > 8 else math.nan
    except ValueError:
        seconds = math.nan
    if math.isfinite(seconds) and seconds >= 0:
        return seconds
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{what} {text!r} is no time",
            hint="give 7d, 12h, 2026-11-01, 2026-11-01T09:30Z or Unix seconds",
        ) from None
