"""Schedules as a client has them: workflow files that run by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agentic_flow.core.auth import Principal
from agentic_flow.swarm.schedules import Schedule, ScheduleRequest, ScheduleService
from agentic_flow.swarm.workflow_bound import (
    Waits,
    Workflow,
    request_of,
    source_of,
    with_absolute_paths,
    workflow_of,
)

Open = Callable[[], Awaitable[tuple[ScheduleService, Principal]]]


class BoundSchedules:
    """`client.schedules`: of the client's own tenant. A server or a worker makes their runs.

    Args:
        open: Gives the schedules and who asks.
        look: Likewise, without starting anything.
    """

    def __init__(self, open: Open, look: Open) -> None:
        self._open = open
        self._look = look

    async def add(
        self,
        workflow: Workflow,
        inputs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        queue: str | None = None,
        priority: int = 0,
    ) -> Schedule:
        """Keep a workflow that has a `schedule`: it runs by itself from now on.

        Args:
            workflow: The path of a file, or the workflow itself. A later change of the file changes nothing.
            inputs: By name, for every run. Inputs of the type `path` are taken from the current folder.
            name: The schedule's; the workflow's by default.
            queue: The shared queue from which a worker takes its runs.
            priority: -100 to 100; high ones go first.

        Raises:
            InvalidInput: the workflow, its schedule or an input is wrong, or it has no schedule.
            Conflict: there is a schedule of this name.
        """
        source = await asyncio.to_thread(source_of, workflow)
        request = request_of(
            ScheduleRequest,
            {
                **source.model_dump(exclude_unset=True),
                "inputs": with_absolute_paths(workflow_of(source), inputs or {}),
                "name": name,
                "queue": queue,
                "priority": priority,
            },
        )
        schedules, principal = await self._open()
        return await schedules.add(principal, request)

    async def list(self) -> list[Schedule]:
        """All, by name."""
        schedules, principal = await self._look()
        return await schedules.every(principal)

    async def show(self, name: str) -> Schedule:
        """One of them; NotFound when there is none of this name, as from all that follow."""
        schedules, principal = await self._look()
        return await schedules.show(principal, name)

    async def pause(self, name: str) -> bool:
        """Let it make no more runs until it is resumed; False when it is paused already."""
        schedules, principal = await self._look()
        return await schedules.pause(principal, name)

    async def resume(self, name: str) -> bool:
        """Let it go on with its next time; False when it is active."""
        schedules, principal = await self._look()
        return await schedules.resume(principal, name)

    async def remove(self, name: str) -> None:
        """Forget it; its runs stay."""
        schedules, principal = await self._look()
        await schedules.remove(principal, name)


class WaitedSchedules:
    """`BoundSchedules` for code without an event loop.

    Args:
        bound: The schedules.
        wait: Waits for what they do.
    """

    def __init__(self, bound: BoundSchedules, wait: Waits) -> None:
        self._bound = bound
        self._wait = wait

    def add(self, workflow: Workflow, inputs: Mapping[str, Any] | None = None, **options: Any) -> Schedule:
        """See `BoundSchedules.add`."""
        return self._wait(lambda: self._bound.add(workflow, inputs, **options))

    def list(self) -> list[Schedule]:
        """See `BoundSchedules.list`."""
        return self._wait(self._bound.list)

    def show(self, name: str) -> Schedule:
        """See `BoundSchedules.show`."""
        return self._wait(lambda: self._bound.show(name))

    def pause(self, name: str) -> bool:
        """See `BoundSchedules.pause`."""
        return self._wait(lambda: self._bound.pause(name))

    def resume(self, name: str) -> bool:
        """See `BoundSchedules.resume`."""
        return self._wait(lambda: self._bound.resume(name))

    def remove(self, name: str) -> None:
        """See `BoundSchedules.remove`."""
        return self._wait(lambda: self._bound.remove(name))
