"""Periods of budgets, in UTC. Weeks begin on Monday (ISO 8601). Nothing here knows a time zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from agentic_flow.gateway.policies import Period

_SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "week": 7 * 86_400}
_EPOCH_TO_MONDAY_S = 4 * 86_400  # 1970-01-01 was a Thursday; the first Monday after it is 4 days on.
_LONGEST_S = {**_SECONDS, "month": 31 * 86_400}
_KEPT_PERIODS = 13
_KEPT_S_MIN = 86_400


class Span(NamedTuple):
    """From `start_s` to just before `end_s`, in seconds since the Unix epoch; `total` has no end."""

    start_s: int
    end_s: int | None


def span(period: Period, time_s: float) -> Span:
    """The period that holds this moment.

    Args:
        period: Kind of period.
        time_s: Seconds since the Unix epoch, from 1970 on.
    """
    if period == "total":
        return Span(0, None)
    if period == "month":
        moment = datetime.fromtimestamp(time_s // 1, UTC)
        first = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        following = (first + timedelta(days=32)).replace(day=1)
        return Span(int(first.timestamp()), int(following.timestamp()))
    length_s = _SECONDS[period]
    offset_s = _EPOCH_TO_MONDAY_S if period == "week" else 0
    start_s = int((time_s - offset_s) // length_s) * length_s + offset_s
    return Span(start_s, start_s + length_s)


def kept_until_s(period: Period, end_s: int | None) -> int | None:
    """When the account of a period may be removed: 13 periods later, a day at least; `total`: never."""
    if end_s is None:
        return None
    return end_s + max(_KEPT_S_MIN, _KEPT_PERIODS * _LONGEST_S[period])
