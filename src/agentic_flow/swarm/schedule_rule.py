"""When a schedule is due: pure functions of a rule and a time, without a clock of their own.

Times are seconds since 1970, so that none comes twice when the clocks are put back. What cron does then is
the library's, which follows Debian's: a time of day that is skipped comes as soon as it can, one that is
repeated comes once, and a rule with `*` for its hours or minutes goes by elapsed time.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, StringConstraints, field_validator, model_validator

from agentic_flow.core.messages import Record

CATCH_UP_MIN_S, CATCH_UP_MAX_S = 60.0, 7 * 86_400.0


class ScheduleRule(Record):
    """When a workflow runs by itself: by `cron`, five fields, in a `timezone`; or `every_s` seconds.

    `overlap`: whether it runs while the run before is unfinished. A time that was missed, because no process
    was there, is made up for if it is at most `catch_up_s` ago: once, for the newest; the others are skipped.
    """

    cron: Annotated[str, StringConstraints(min_length=9, max_length=200)] | None = None
    timezone: Annotated[str, StringConstraints(min_length=1, max_length=64)] = "UTC"
    every_s: Annotated[float, Field(ge=1, le=366 * 86_400)] | None = None
    overlap: Literal["skip", "allow"] = "skip"
    catch_up_s: Annotated[float, Field(ge=CATCH_UP_MIN_S, le=CATCH_UP_MAX_S)] = 3600.0

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, text: str | None) -> str | None:
        if text is None:
            return None
        from cronsim import CronSim, CronSimError

        if len(text.split()) != 5:
            raise ValueError("cron has five fields: minute, hour, day, month, weekday")
        try:
            next(CronSim(text, datetime(2024, 1, 1, tzinfo=UTC)))
        except CronSimError as error:
            raise ValueError(f"this is no cron expression: {error}") from None
        except StopIteration:
            raise ValueError("this time never comes") from None
        return text

    @field_validator("timezone")
    @classmethod
    def _is_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (OSError, ValueError, KeyError):  # also names that are paths, or folders of the database
            raise ValueError("there is no such IANA time zone; write it like Europe/Vienna") from None
        return name

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.cron is None) == (self.every_s is None):
            raise ValueError("give exactly one of cron and every_s")
        return self

    @property
    def text(self) -> str:
        """The rule in words."""
        if self.every_s is not None:
            return f"every {self.every_s:g} s"
        return f"{self.cron} {self.timezone}"


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done about a schedule whose time has come.

    Args:
        fire_s: The due time that it runs for; None: all that came are too long ago.
        next_s: The next due time.
        missed: Whether due times were passed over.
    """

    fire_s: float | None
    next_s: float
    missed: bool


def next_due(rule: ScheduleRule, after_s: float, *, anchor_s: float) -> float:
    """The first due time after a time.

    Args:
        rule: The rule.
        after_s: That time.
        anchor_s: From when `every_s` counts.
    """
    return next(_times(rule, after_s, anchor_s))


def due(rule: ScheduleRule, next_s: float, now_s: float, *, anchor_s: float) -> Due | None:
    """What is to be done now; None: it is not due.

    Args:
        rule: The rule.
        next_s: The due time that it waits for.
        now_s: The present.
        anchor_s: From when `every_s` counts.
    """
    if next_s > now_s:
        return None
    oldest_s = now_s - rule.catch_up_s
    if rule.every_s is not None:
        last_s = anchor_s + math.floor((now_s - anchor_s) / rule.every_s) * rule.every_s
        newest_s = max(last_s, next_s)
        coming_s = next_due(rule, max(now_s, newest_s), anchor_s=anchor_s)
        return Due(newest_s if newest_s >= oldest_s else None, coming_s, newest_s != next_s)
    # What is older than it may be made up for need not be looked at one by one.
    candidate_s = next_s if next_s >= oldest_s else None
    times = _times(rule, max(next_s, oldest_s - 1), anchor_s)
    while (coming_s := next(times)) <= now_s:
        if coming_s >= oldest_s:
            candidate_s = coming_s
    return Due(candidate_s, coming_s, candidate_s != next_s)


def _times(rule: ScheduleRule, after_s: float, anchor_s: float) -> Generator[float]:
    if rule.every_s is not None:
        count = math.floor((after_s - anchor_s) / rule.every_s)
        while True:
            count += 1
            if (time_s := anchor_s + count * rule.every_s) > after_s:
                yield time_s
    from cronsim import CronSim

    start = datetime.fromtimestamp(math.floor(after_s), UTC).astimezone(_zone(rule.timezone))
    for found in CronSim(str(rule.cron), start):
        # In an hour that is repeated the library answers with the first of both, which may be over.
        if (time_s := found.timestamp()) > after_s:
            yield time_s


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
