"""Decisions of the run engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.scheduling import (
    TAKEOVERS_MAX,
    UNFINISHED,
    Fence,
    Places,
    Queued,
    StoredWorkflow,
    chosen,
    claim_verdict,
    is_alive,
    may_record,
    state_of,
)

STATUSES = ("queued", "running", "completed", "failed", "cancelled", "given_up")


@dataclass(eq=False, frozen=True)
class Work:
    """Something that waits; `number` is the order of its coming."""

    number: int
    tenant: str
    priority: int


works = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=30)


def admitted_in_order(
    places: Places[Work], ends_first: st.DataObject | None, every: list[Work]
) -> list[Work]:
    """Let all work, one after the other, in the order in which they get places."""
    order: list[Work] = []
    working: list[Work] = []
    for work in every:
        places.ask(work)
    while True:
        working += places.admit()
        if not working:
            return order
        index = 0 if ends_first is None else ends_first.draw(st.integers(0, len(working) - 1))
        ended = working.pop(index)
        order.append(ended)
        places.give_back(ended)


@given(works, st.integers(1, 4), st.data())
def test_everything_gets_a_place_once(
    wanted: list[tuple[str, int]], places_max: int, data: st.DataObject
) -> None:
    """Catches work that is never admitted, admitted twice, or places that leak."""
    places: Places[Work] = Places(places_max)
    every = [Work(number, tenant, priority) for number, (tenant, priority) in enumerate(wanted)]
    order = admitted_in_order(places, data, every)
    assert Counter(order) == Counter(every)
    assert places.free == places_max


@given(works)
def test_priority_then_age_within_a_tenant(wanted: list[tuple[str, int]]) -> None:
    """Catches a tenant's old or important work overtaken by its own new or unimportant work."""
    every = [Work(number, tenant, priority) for number, (tenant, priority) in enumerate(wanted)]
    order = admitted_in_order(Places(1), None, every)
    assert [work.priority for work in order] == sorted((w.priority for w in every), reverse=True)
    for tenant in "abc":
        own = [work for work in order if work.tenant == tenant]
        assert own == sorted(own, key=lambda work: (-work.priority, work.number))


@given(st.integers(1, 40), st.integers(1, 4))
def test_a_flood_does_not_starve_others(flood: int, places_max: int) -> None:
    """Catches a tenant with many runs that makes another wait for more than the places in use."""
    places: Places[Work] = Places(places_max)
    for number in range(flood):
        places.ask(Work(number, "loud", 0))
    working = places.admit()
    quiet = Work(flood, "quiet", 0)
    places.ask(quiet)
    if flood >= places_max:
        places.give_back(working[0])
    assert quiet in places.admit()


@given(works, st.integers(1, 3), st.data())
def test_who_leaves_the_queue_frees_nothing_it_had_not(
    wanted: list[tuple[str, int]], places_max: int, data: st.DataObject
) -> None:
    """Catches more work at once than there are places, after cancellations in every state."""
    places: Places[Work] = Places(places_max)
    every = [Work(number, tenant, priority) for number, (tenant, priority) in enumerate(wanted)]
    holding: set[Work] = set()
    for work in every:
        places.ask(work)
        if data.draw(st.booleans()):
            holding |= set(places.admit())
        if data.draw(st.booleans()):
            leaving = data.draw(st.sampled_from(every[: work.number + 1]))
            for _ in range(2):  # twice is as good as once
                places.give_back(leaving)
            holding.discard(leaving)
        assert len(holding) <= places_max


@given(st.sampled_from(STATUSES), st.booleans(), st.integers(0, 2 * TAKEOVERS_MAX), st.booleans())
def test_claims(status: str, owner_lives: bool, takeovers: int, asked: bool) -> None:
    """Catches a live owner robbed, a finished run begun anew, and a run that kills processes for ever."""
    verdict = claim_verdict(status, owner_lives=owner_lives, takeovers=takeovers, asked=asked)
    if status in UNFINISHED and owner_lives:
        assert verdict == "leave"
    if status in ("completed", "failed"):
        assert verdict == "leave"
    if not asked:
        assert verdict != "claim" or (status in UNFINISHED and takeovers < TAKEOVERS_MAX)
    if asked and status in ("cancelled", "given_up"):
        assert verdict == "claim"


fences = st.builds(Fence, st.sampled_from(["a", "b"]), st.integers(1, 3))
stored = st.builds(StoredWorkflow, st.sampled_from(STATUSES), st.sampled_from(["a", "b"]), st.integers(1, 3))


@given(st.none() | stored, st.none() | stored, fences)
def test_only_the_owner_records_and_only_while_it_is_unfinished(
    root: StoredWorkflow | None, workflow: StoredWorkflow | None, fence: Fence
) -> None:
    """Catches a late write of a former owner, and a result written over a cancellation or an end."""
    permission = may_record(root, workflow, fence)
    is_owner = root is not None and Fence(root.executor_id, root.epoch) == fence
    may = is_owner and workflow is not None and workflow.status in UNFINISHED
    assert (permission == "granted") == may
    if permission == "cancelled":
        assert workflow is not None
        assert workflow.status == "cancelled"


@given(st.sampled_from(STATUSES), st.sampled_from(STATUSES), st.booleans())
def test_states_are_true(status: str, root_status: str, owner_lives: bool) -> None:
    """Catches "running" said of what nobody runs, and an end that was not stored."""
    state = state_of(status, root_status, owner_lives=owner_lives)
    if state in ("running", "queued"):
        assert owner_lives
        assert status in UNFINISHED
    assert (state in ("completed", "failed", "cancelled")) == (state == status and status not in UNFINISHED)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0.1, 100), st.sampled_from([None, True, False]))
def test_silence_or_a_lost_lock_is_death(
    heartbeat_at_s: float, now_s: float, lease_s: float, holds_lock: bool | None
) -> None:
    """Catches a killed process that counts as alive, and a live one that counts as dead."""
    alive = is_alive(heartbeat_at_s, now_s, lease_s, holds_lock=holds_lock)
    assert alive == (holds_lock is not False and heartbeat_at_s >= now_s - lease_s)


waits = st.lists(
    st.tuples(st.sampled_from(("p", "q")), st.sampled_from("abc"), st.integers(-1, 1), st.integers(0, 9)),
    max_size=30,
)
counts = st.dictionaries(st.tuples(st.sampled_from(("p", "q")), st.sampled_from("abc")), st.integers(1, 3))


def queued(wanted: list[tuple[str, str, int, int]]) -> list[Queued]:
    return [Queued(f"r{n}", q, p, t, float(at), 0.0) for n, (q, t, p, at) in enumerate(wanted)]


@given(waits, counts, st.integers(0, 8), st.integers(1, 4), st.integers(1, 4))
def test_limits_of_queues_and_tenants_hold(
    wanted: list[tuple[str, str, int, int]],
    running: dict[tuple[str, str], int],
    free: int,
    queue_max: int,
    tenant_max: int,
) -> None:
    """Catches a run taken twice, over a limit or a place; and a free place that a run within limits lacks."""
    waiting = queued(wanted)
    got = chosen(waiting, running, free, queue_runs_max={"p": queue_max}, tenant_runs_max=tenant_max)
    assert len({one.run_id for one in got}) == len(got) <= free
    of_queue, of_tenant = Counter[str](), Counter[str]()
    for (queue, tenant), count in running.items():
        of_queue[queue] += count
        of_tenant[tenant] += count
    before = of_queue["p"], dict(of_tenant)
    of_queue.update(one.queue for one in got)
    of_tenant.update(one.tenant for one in got)
    assert of_queue["p"] <= max(queue_max, before[0])
    for tenant in "abc":
        assert of_tenant[tenant] <= max(tenant_max, before[1].get(tenant, 0))
    if len(got) < free:
        for left in set(waiting) - set(got):
            full = left.queue == "p" and of_queue["p"] >= queue_max
            assert full or of_tenant[left.tenant] >= tenant_max


@given(waits, st.integers(0, 8), st.integers(0, 4), st.sets(st.integers(0, 30)))
def test_rates_of_queues_hold(
    wanted: list[tuple[str, str, int, int]], free: int, starts: int, returned: set[int]
) -> None:
    """Catches more starts of a queue than are left, one that holds back what had begun, or another queue."""
    waiting = [
        replace(one, is_start=number not in returned) for number, one in enumerate(queued(wanted), start=0)
    ]
    got = chosen(waiting, {}, free, queue_runs_max={}, tenant_runs_max=None, starts_left={"p": starts})
    begun = [one for one in got if one.queue == "p" and one.is_start]
    assert len(begun) <= starts
    if len(got) < free:
        rest = set(waiting) - set(got)
        assert all(one.queue == "p" and one.is_start for one in rest)
        assert not rest or len(begun) == starts


@given(waits, st.integers(1, 40))
def test_no_line_is_overtaken_from_behind(wanted: list[tuple[str, str, int, int]], free: int) -> None:
    """Catches a priority that yields to a lower one, and within a tenant's line younger work before older."""
    waiting = queued(wanted)
    got = chosen(waiting, {}, free, queue_runs_max={}, tenant_runs_max=None)
    assert [one.priority for one in got] == sorted((one.priority for one in got), reverse=True)
    lines: dict[tuple[str, str, int], list[float]] = {}
    for one in got:
        lines.setdefault((one.queue, one.tenant, one.priority), []).append(one.at_s)
    assert all(ages == sorted(ages) for ages in lines.values())


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 20))
def test_tenants_take_turns(many: int, few: int, free: int) -> None:
    """Catches a tenant that gets more than its share because it has more that waits, or came first."""
    waiting = queued([("q", "a", 0, 0)] * many + [("q", "b", 0, 9)] * few)
    got = Counter(one.tenant for one in chosen(waiting, {}, free, queue_runs_max={}, tenant_runs_max=None))
    assert got["b"] >= min(few, free // 2)


def test_who_was_served_the_longest_ago_is_next() -> None:
    """Catches a tenant that gets a single place again and again because its work is older."""
    old = Queued("old", "q", 0, "a", 1.0, served_at_s=50.0)
    young = Queued("young", "q", 0, "b", 2.0, served_at_s=40.0)
    assert chosen([old, young], {}, 1, queue_runs_max={}, tenant_runs_max=None) == [young]
