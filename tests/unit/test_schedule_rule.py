"""When schedules are due: cron and intervals, daylight saving, missed times, clocks that jump."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentic_flow.swarm.schedule_rule import Due, ScheduleRule, due, next_due

VIENNA = ZoneInfo("Europe/Vienna")
HOUR_S, DAY_S = 3600.0, 86_400.0


def at(text: str, zone: ZoneInfo | None = None, fold: int = 0) -> float:
    """Seconds since 1970 of a local time."""
    return datetime.fromisoformat(text).replace(tzinfo=zone or UTC, fold=fold).timestamp()


def upcoming(rule: ScheduleRule, after_s: float, count: int) -> list[str]:
    """The next due times, as local times with their offset from UTC."""
    found: list[str] = []
    for _ in range(count):
        after_s = next_due(rule, after_s, anchor_s=0.0)
        found.append(datetime.fromtimestamp(after_s, ZoneInfo(rule.timezone)).strftime("%d %H:%M %z"))
    return found


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        # Clocks go from 02:00 to 03:00 on 29 March 2026: what falls into the hour that is not comes after it.
        ("30 2 * * *", "2026-03-27T12:00", ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]),
        ("0 6 * * *", "2026-03-28T12:00", ["29 06:00 +0200", "30 06:00 +0200"]),
        ("0 * * * *", "2026-03-29T00:30", ["29 01:00 +0100", "29 03:00 +0200", "29 04:00 +0200"]),
        # From 03:00 back to 02:00 on 25 October 2026: a time of day comes once, every hour comes.
        ("30 2 * * *", "2026-10-24T12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("0 * * * *", "2026-10-25T01:30", ["25 02:00 +0200", "25 02:00 +0100", "25 03:00 +0100"]),
        ("0 9 * * 1-5", "2026-10-23T10:00", ["26 09:00 +0100", "27 09:00 +0100"]),
        ("0 0 29 2 *", "2026-10-23T10:00", ["29 00:00 +0100"]),
    ],
)
def test_cron_follows_the_clock_on_the_wall(cron: str, after: str, expected: list[str]) -> None:
    """Catches a run that a change of daylight saving moves by an hour, drops or doubles."""
    rule = ScheduleRule(cron=cron, timezone="Europe/Vienna")
    assert upcoming(rule, at(after, VIENNA), len(expected)) == expected


def test_a_repeated_hour_does_not_repeat_the_past() -> None:
    """Catches a due time before the present when the present is in the second of two equal hours."""
    rule = ScheduleRule(cron="30 2 * * *", timezone="Europe/Vienna")
    second = at("2026-10-25T02:10", VIENNA, fold=1)
    assert next_due(rule, second, anchor_s=0.0) == at("2026-10-26T02:30", VIENNA)


RULES = st.one_of(
    st.builds(
        ScheduleRule,
        every_s=st.sampled_from([1.0, 7.0, 90.0, 3600.0, 12_345.0, DAY_S]),
        catch_up_s=st.sampled_from([60.0, 3600.0, 2 * DAY_S]),
    ),
    st.builds(
        ScheduleRule,
        cron=st.sampled_from(["*/7 * * * *", "0 * * * *", "30 2 * * *", "15 */5 * * *", "0 0 1 * *"]),
        timezone=st.sampled_from(["UTC", "Europe/Vienna", "America/New_York", "Australia/Lord_Howe"]),
        catch_up_s=st.sampled_from([60.0, 3600.0, 2 * DAY_S]),
    ),
)
TIMES = st.floats(at("2025-01-01T00:00"), at("2028-01-01T00:00"))


@settings(max_examples=200, deadline=None)
@given(rule=RULES, start_s=TIMES, away_s=st.floats(0, 3 * DAY_S))
def test_what_is_due_is_a_due_time_and_recent(rule: ScheduleRule, start_s: float, away_s: float) -> None:
    """Catches a time that fires twice, early, too late or not at all, after any pause of all processes."""
    waits_s = next_due(rule, start_s, anchor_s=start_s)
    assert waits_s > start_s
    now_s = start_s + away_s
    found = due(rule, waits_s, now_s, anchor_s=start_s)
    if waits_s > now_s:
        assert found is None
        return
    assert found is not None
    assert found.next_s > now_s
    assert found.next_s == next_due(rule, now_s, anchor_s=start_s)
    assert due(rule, found.next_s, now_s, anchor_s=start_s) is None
    if found.fire_s is None:
        assert next_due(rule, max(waits_s, now_s - rule.catch_up_s), anchor_s=start_s) == found.next_s
        return
    assert max(waits_s, now_s - rule.catch_up_s) <= found.fire_s <= now_s
    assert found.missed == (found.fire_s != waits_s)
    # The newest: between it and the present none is due.
    assert next_due(rule, found.fire_s, anchor_s=start_s) == found.next_s


def test_missed_times_are_made_up_for_once_or_skipped() -> None:
    """Catches a night without a server that ends in as many runs as times were missed, or in none."""
    rule = ScheduleRule(cron="0 * * * *", catch_up_s=2 * HOUR_S)
    nine, now_s = at("2026-05-01T09:00"), at("2026-05-02T07:30")
    assert due(rule, nine, now_s, anchor_s=0.0) == Due(
        at("2026-05-02T07:00"), at("2026-05-02T08:00"), missed=True
    )
    daily = ScheduleRule(cron="0 9 * * *", catch_up_s=2 * HOUR_S)
    assert due(daily, nine, now_s, anchor_s=0.0) == Due(None, at("2026-05-02T09:00"), missed=True)
    assert due(daily, nine, nine + 2 * HOUR_S, anchor_s=0.0) == Due(nine, nine + DAY_S, missed=False)
    assert due(daily, nine, nine - 1, anchor_s=0.0) is None


def test_a_year_away_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that looks at every minute of a year: it would hold everybody up for seconds."""
    import cronsim

    asked = [0]
    step = cronsim.CronSim.__next__

    def counted(self: cronsim.CronSim) -> datetime:
        asked[0] += 1
        return step(self)

    monkeypatch.setattr(cronsim.CronSim, "__next__", counted)
    rule = ScheduleRule(cron="* * * * *", catch_up_s=60.0)
    now_s = at("2027-05-01T09:00") + 30
    found = due(rule, at("2026-05-01T09:00"), now_s, anchor_s=0.0)
    assert found == Due(at("2027-05-01T09:00"), at("2027-05-01T09:01"), missed=True)
    assert 0 < asked[0] < 10


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "exactly one"),
        ({"cron": "0 6 * * *", "every_s": 60}, "exactly one"),
        ({"cron": "0 6 * * * *"}, "five fields"),
        ({"cron": "61 6 * * *"}, "no cron expression"),
        ({"cron": "0 0 31 2 *"}, "cron expression|never comes"),
        ({"cron": "0 6 * * *", "timezone": "Mars/Olympus"}, "no such IANA time zone"),
        ({"cron": "0 6 * * *", "timezone": "../../etc/passwd"}, "no such IANA time zone"),
        ({"cron": "0 6 * * *", "timezone": "Europe"}, "no such IANA time zone"),
        ({"every_s": 0}, "greater than or equal to 1"),
        ({"every_s": 60, "catch_up_s": 0}, "greater than or equal to 60"),
        ({"every_s": 60, "overlap": "queue"}, "skip"),
    ],
)
def test_wrong_rules_are_refused(fields: dict[str, object], told: str) -> None:
    """Catches a rule that would never fire, or fire at times nobody meant."""
    with pytest.raises(ValidationError, match=told):
        ScheduleRule.model_validate(fields)
