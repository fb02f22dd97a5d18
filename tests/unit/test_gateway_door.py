"""The gateway's door under load: who is let in, in which order, who is sent away and when."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.clock import Deadline, SystemClock
from agentic_flow.core.errors import DeadlineExceeded, Unavailable
from agentic_flow.gateway.limits import Door

pytestmark = pytest.mark.anyio

LONG_S = 60.0


class HandClock(SystemClock):
    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s


class House:
    """A door, and visitors who stay until they are told to go."""

    def __init__(
        self,
        concurrent_max: int,
        queue_max: int = 100,
        timeout_s: float = LONG_S,
        clock: HandClock | None = None,
    ) -> None:
        self.door = Door(
            concurrent_max=concurrent_max,
            queue_max=queue_max,
            queue_timeout_s=timeout_s,
            clock=clock or SystemClock(),
        )
        self.order: list[str] = []
        self.most_inside = 0
        self._now_inside: list[tuple[str, asyncio.Event]] = []

    async def visit(self, name: str, tenant: str = "", deadline_s: float = LONG_S) -> None:
        leave = asyncio.Event()
        async with self.door.enter(Deadline.after(deadline_s), tenant=tenant):
            self.order.append(name)
            self._now_inside.append((name, leave))
            self.most_inside = max(self.most_inside, len(self._now_inside))
            try:
                await leave.wait()
            finally:
                self._now_inside.remove((name, leave))

    async def arrive(self, name: str, tenant: str = "", deadline_s: float = LONG_S) -> asyncio.Task[None]:
        """A visitor who has come as far as it goes now."""
        task = asyncio.create_task(self.visit(name, tenant, deadline_s))
        await self.settle()
        return task

    async def one_leaves(self) -> None:
        self._now_inside[0][1].set()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def all_leave(self) -> None:
        while self._now_inside:
            await self.one_leaves()


async def test_no_more_are_inside_than_allowed_and_the_rest_wait_in_order() -> None:
    """Catches a door that lets too many in, loses one who waits, or lets newcomers pass the line."""
    house = House(2)
    tasks = [await house.arrive(str(number)) for number in range(6)]
    assert (house.door.inside, house.door.waiting) == (2, 4)
    await house.all_leave()
    await asyncio.gather(*tasks)
    assert house.order == [str(number) for number in range(6)]
    assert house.most_inside == 2
    assert (house.door.inside, house.door.waiting) == (0, 0)


async def test_an_open_door_does_not_suspend() -> None:
    """Catches a way in that costs a turn of the event loop, a future or a task."""
    door = Door(concurrent_max=1, queue_max=0, queue_timeout_s=1)
    entry = door.enter(Deadline.after(LONG_S))
    entering = entry.__aenter__()
    with pytest.raises(StopIteration):
        entering.send(None)
    assert door.inside == 1
    leaving = entry.__aexit__(None, None, None)
    with pytest.raises(StopIteration):
        leaving.send(None)
    assert door.inside == 0


async def test_tenants_take_turns() -> None:
    """Catches a noisy tenant whose line others have to wait behind."""
    house = House(1)
    tasks = [await house.arrive("first")]
    tasks += [await house.arrive(f"noisy-{number}", "noisy") for number in range(4)]
    tasks += [await house.arrive(f"quiet-{number}", "quiet") for number in range(2)]
    await house.all_leave()
    await asyncio.gather(*tasks)
    assert house.order == ["first", "noisy-0", "quiet-0", "noisy-1", "quiet-1", "noisy-2", "noisy-3"]


async def test_a_full_line_sends_away_at_once_and_says_when_to_return() -> None:
    """Catches a line without bound, and a refusal without a time."""
    house = House(1, queue_max=2)
    tasks = [await house.arrive(str(number)) for number in range(3)]
    with pytest.raises(Unavailable, match="1 requests are served and 2 wait") as refused:
        await house.visit("late")
    assert refused.value.status == 503
    assert refused.value.retry_after_s is not None
    assert house.door.waiting == 2
    await house.all_leave()
    await asyncio.gather(*tasks)


async def test_a_full_line_of_one_tenant_has_room_for_another() -> None:
    """Catches a noisy tenant that fills the line, so that others are sent away."""
    house = House(1, queue_max=4)
    tasks = [await house.arrive("first")]
    tasks += [await house.arrive(f"noisy-{number}", "noisy") for number in range(4)]
    quiet = [await house.arrive(f"quiet-{number}", "quiet") for number in range(2)]
    assert house.door.waiting == 4
    for pushed_out in (tasks.pop(), tasks.pop()):
        with pytest.raises(Unavailable):
            await pushed_out
    with pytest.raises(Unavailable):
        await house.visit("quiet-2", "quiet")  # it would be the noisy one now
    await house.all_leave()
    await asyncio.gather(*tasks, *quiet)
    assert house.order == ["first", "noisy-0", "quiet-0", "noisy-1", "quiet-1"]


async def test_no_line_at_all() -> None:
    """Catches waiting where queue_max is 0."""
    house = House(1, queue_max=0)
    task = await house.arrive("only")
    with pytest.raises(Unavailable):
        await house.visit("late")
    await house.all_leave()
    await task
    task = await house.arrive("next")
    await house.all_leave()
    await task


async def test_waiting_ends_with_the_queue_timeout() -> None:
    """Catches a request that waits on although its time in the line is over, or keeps a place in it."""
    house = House(1, timeout_s=0.01)
    task = await house.arrive("inside")
    with pytest.raises(Unavailable):
        await house.visit("late")
    assert (house.door.inside, house.door.waiting) == (1, 0)
    await house.all_leave()
    await task


async def test_waiting_ends_with_the_deadline() -> None:
    """Catches a request that is answered after its caller has gone, and the wrong error for it."""
    house = House(1)
    task = await house.arrive("inside")
    with pytest.raises(DeadlineExceeded):
        await house.visit("late", deadline_s=0.01)
    with pytest.raises(DeadlineExceeded):
        await house.visit("too late", deadline_s=0)
    assert (house.door.inside, house.door.waiting) == (1, 0)
    await house.all_leave()
    await task


async def test_cancelling_frees_the_place_in_the_line_and_inside() -> None:
    """Catches places that leak with each client that hangs up."""
    house = House(1)
    inside, waiting, last = [await house.arrive(name) for name in ("inside", "waiting", "last")]
    waiting.cancel()
    await house.settle()
    assert (house.door.inside, house.door.waiting) == (1, 1)
    inside.cancel()
    await house.settle()
    assert house.order == ["inside", "last"]
    await house.all_leave()
    await last
    assert (house.door.inside, house.door.waiting) == (0, 0)


async def test_a_place_given_to_one_who_is_cancelled_in_that_moment_goes_on() -> None:
    """Catches the place that is lost between being given and being taken."""
    house = House(1)
    async with house.door.enter(Deadline.after(LONG_S)):
        chosen = await house.arrive("chosen")
        other = await house.arrive("other")
    chosen.cancel()  # its future has a result now, but it has not run yet
    await house.settle()
    assert chosen.cancelled()
    assert house.order == ["other"]
    await house.all_leave()
    await other
    assert (house.door.inside, house.door.waiting) == (0, 0)


async def test_an_error_inside_gives_the_place_back() -> None:
    """Catches a door that a failing provider closes for good."""
    door = Door(concurrent_max=1, queue_max=0, queue_timeout_s=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with door.enter(Deadline.after(LONG_S)):
                raise ZeroDivisionError
    assert door.inside == 0


async def test_the_time_to_return_follows_the_rate() -> None:
    """Catches a fixed number: a line of two at one a second takes three seconds to be through."""
    clock = HandClock()
    house = House(1, queue_max=2, clock=clock)
    tasks = [await house.arrive("first")]
    clock.now_s += 6  # a pause, which says nothing about the rate
    tasks += [await house.arrive(str(number)) for number in range(2)]
    for number in range(2, 6):
        clock.now_s += 1
        await house.one_leaves()
        tasks.append(await house.arrive(str(number)))
    with pytest.raises(Unavailable) as refused:
        await house.visit("late")
    assert refused.value.retry_after_s == pytest.approx(3.0)
    await house.all_leave()
    await asyncio.gather(*tasks)


@settings(max_examples=60)
@given(
    concurrent_max=st.integers(1, 3),
    queue_max=st.integers(0, 6),
    acts=st.lists(st.tuples(st.sampled_from(["come", "leave", "cancel"]), st.integers(0, 3)), max_size=50),
)
def test_whatever_happens_no_place_is_lost(
    concurrent_max: int, queue_max: int, acts: list[tuple[str, int]]
) -> None:
    """Catches a count that drifts: afterwards the door is empty, and nobody waits while there is room."""

    async def scenario() -> None:
        house = House(concurrent_max, queue_max)
        tasks: list[asyncio.Task[None]] = []
        for number, (act, which) in enumerate(acts):
            if act == "come":
                tasks.append(await house.arrive(str(number), f"tenant-{which}"))
            elif act == "leave" and house.door.inside:
                await house.one_leaves()
            elif act == "cancel" and tasks:
                tasks[which % len(tasks)].cancel()
                await house.settle()
            assert house.door.inside <= concurrent_max
            assert house.door.waiting <= queue_max
            assert house.door.waiting == 0 or house.door.inside == concurrent_max
        await house.all_leave()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = Counter(type(outcome) for outcome in done)
        assert set(kinds) <= {type(None), Unavailable, asyncio.CancelledError}
        assert (house.door.inside, house.door.waiting) == (0, 0)
        assert house.most_inside <= concurrent_max

    asyncio.run(scenario())
