"""A memory for one caller: the methods of MemoryService without the principal, awaited or waited for."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from agentic_flow.core.auth import Principal
from agentic_flow.memory.answers import MemoryService

P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate[MemoryService, Principal, P], Awaitable[T]]


class Waits(Protocol):
    """Runs what is awaited elsewhere and gives its result."""

    def __call__(self, function: Callable[[], Awaitable[T]], /) -> T: ...


def _awaited(
    method: Method[P, T],
) -> Callable[Concatenate[BoundMemory, P], Coroutine[Any, Any, T]]:
    """The method of this name of whatever service is open, in the caller's name."""

    @functools.wraps(method)
    async def call(self: BoundMemory, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.ask(method, *args, **kwargs)

    return call


def _waited(method: Method[P, T]) -> Callable[Concatenate[WaitedMemory, P], T]:
    @functools.wraps(method)
    def call(self: WaitedMemory, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.ask(method, *args, **kwargs)

    return call


class BoundMemory:
    """`client.memory`: see MemoryService for each method; whose memory it is, is settled.

    Args:
        open: Gives the service and the caller.
    """

    def __init__(self, open: Callable[[], Awaitable[tuple[MemoryService, Principal]]]) -> None:
        self._open = open

    async def ask(self, method: Method[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `method` of the service in the caller's name."""
        memory, principal = await self._open()
        own: Callable[..., Awaitable[T]] = getattr(memory, method.__name__)
        return await own(principal, *args, **kwargs)

    recall = _awaited(MemoryService.recall)
    start = _awaited(MemoryService.start)
    append = _awaited(MemoryService.append)
    finish = _awaited(MemoryService.finish)
    record = _awaited(MemoryService.record)
    trajectory = _awaited(MemoryService.trajectory)
    trajectories = _awaited(MemoryService.trajectories)
    similar = _awaited(MemoryService.similar)
    add_verdict = _awaited(MemoryService.add_verdict)
    learn = _awaited(MemoryService.learn)
    retry = _awaited(MemoryService.retry)
    add = _awaited(MemoryService.add)
    items = _awaited(MemoryService.items)
    explain = _awaited(MemoryService.explain)
    edit = _awaited(MemoryService.edit)
    forget = _awaited(MemoryService.forget)
    consolidate = _awaited(MemoryService.consolidate)
    uplift = _awaited(MemoryService.uplift)
    verify = _awaited(MemoryService.verify)
    take_in = _awaited(MemoryService.take_in)
    series = _awaited(MemoryService.series)
    status = _awaited(MemoryService.status)
    list_skills = _awaited(MemoryService.list_skills)
    find_skills = _awaited(MemoryService.find_skills)
    show_skill = _awaited(MemoryService.show_skill)
    use_skill = _awaited(MemoryService.use_skill)
    record_skill_use = _awaited(MemoryService.record_skill_use)
    forget_skill = _awaited(MemoryService.forget_skill)
    list_episodes = _awaited(MemoryService.list_episodes)
    show_episode = _awaited(MemoryService.show_episode)
    forget_episode = _awaited(MemoryService.forget_episode)
    tries = _awaited(MemoryService.tries)
    assess = _awaited(MemoryService.assess)
    contrast = _awaited(MemoryService.contrast)


class WaitedMemory:
    """The same for code without an event loop.

    Args:
        memory: The one to wait for.
        wait: Runs it on its loop.
    """

    def __init__(self, memory: BoundMemory, wait: Waits) -> None:
        self._memory = memory
        self._wait = wait

    def ask(self, method: Method[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `method` of the service in the caller's name, and wait for its answer."""
        return self._wait(lambda: self._memory.ask(method, *args, **kwargs))

    recall = _waited(MemoryService.recall)
    start = _waited(MemoryService.start)
    append = _waited(MemoryService.append)
    finish = _waited(MemoryService.finish)
    record = _waited(MemoryService.record)
    trajectory = _waited(MemoryService.trajectory)
    trajectories = _waited(MemoryService.trajectories)
    similar = _waited(MemoryService.similar)
    add_verdict = _waited(MemoryService.add_verdict)
    learn = _waited(MemoryService.learn)
    retry = _waited(MemoryService.retry)
    add = _waited(MemoryService.add)
    items = _waited(MemoryService.items)
    explain = _waited(MemoryService.explain)
    edit = _waited(MemoryService.edit)
    forget = _waited(MemoryService.forget)
    consolidate = _waited(MemoryService.consolidate)
    uplift = _waited(MemoryService.uplift)
    verify = _waited(MemoryService.verify)
    take_in = _waited(MemoryService.take_in)
    series = _waited(MemoryService.series)
    status = _waited(MemoryService.status)
    list_skills = _waited(MemoryService.list_skills)
    find_skills = _waited(MemoryService.find_skills)
    show_skill = _waited(MemoryService.show_skill)
    use_skill = _waited(MemoryService.use_skill)
    record_skill_use = _waited(MemoryService.record_skill_use)
    forget_skill = _waited(MemoryService.forget_skill)
    list_episodes = _waited(MemoryService.list_episodes)
    show_episode = _waited(MemoryService.show_episode)
    forget_episode = _waited(MemoryService.forget_episode)
    tries = _waited(MemoryService.tries)
    assess = _waited(MemoryService.assess)
    contrast = _waited(MemoryService.contrast)
