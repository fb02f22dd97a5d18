"""Decisions of the run engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.swarm.scheduling import (
    TAKEOVERS_MAX,
    UNFINISHED,
    Fence,
    Places,
    StoredWorkflow,
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
