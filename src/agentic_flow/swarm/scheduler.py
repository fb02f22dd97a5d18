"""Keeps schedules, and makes their runs: every process that takes runs over looks once a second."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

import structlog

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.ports import RunState
from agentic_flow.swarm.schedule_rule import due, next_due
from agentic_flow.swarm.schedule_store import Row, ScheduleStore
from agentic_flow.swarm.schedules import Schedule, ScheduleRequest
from agentic_flow.swarm.workflow_spec import WorkflowRequest, WorkflowSpec

if TYPE_CHECKING:
    from agentic_flow.swarm.workflow_run import WorkflowPayload

log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.schedules")

_ENDED: frozenset[RunState] = frozenset({"completed", "failed", "cancelled"})

Admit = Callable[[Principal, WorkflowRequest, float], Awaitable["WorkflowPayload"]]
"""Checks a workflow as for a run; refuses what could not begin."""
StateOf = Callable[[str], Awaitable[RunState | None]]
"""How a run stands; None: there is none."""


class Submit(Protocol):
    """Accepts a workflow; see RunService."""

    async def __call__(
        self, principal: Principal, request: WorkflowRequest, *, idempotency_key: str | None = None
    ) -> str: ...


class Scheduler:
    """ScheduleService of the coordinator.

    Args:
        store: Where they are.
        admit: See `Admit`.
        submit: Makes a run.
        state_of: Tells how one stands.
    """

    def __init__(self, store: ScheduleStore, *, admit: Admit, submit: Submit, state_of: StateOf) -> None:
        self._store = store
        self._clock = store.clock
        self._admit = admit
        self._submit = submit
        self._state_of = state_of

    # ---- for callers -------------------------------------------------------------------------------------

    async def add(self, principal: Principal, request: ScheduleRequest) -> Schedule:
        """See ScheduleService."""
        principal.demand("runs:write")
        now_s = self._clock.time_s()
        payload = await self._admit(principal, request.run(), now_s)
        spec: WorkflowSpec = payload.workflow
        rule = spec.schedule
        if rule is None:
            raise InvalidInput(
                f"the workflow {spec.name!r} has no schedule",
                hint='add one, like `schedule: {cron: "0 6 * * *", timezone: Europe/Vienna}`',
            )
        row = Row(
            schedule_id=secrets.token_hex(16),
            tenant=principal.tenant,
            name=request.name or spec.name,
            workflow=spec.name,
            subject=principal.subject,
            scopes=tuple(sorted(principal.scopes)),
            request=request,
            rule=rule,
            is_paused=False,
            anchor_s=now_s,
            next_s=next_due(rule, now_s, anchor_s=now_s),
            firing_s=None,
            last_s=None,
            last_run_id=None,
            fired=0,
            skipped=0,
            note="",
        )
        await asyncio.to_thread(self._store.add, row)
        return row.shown()

    async def every(self, principal: Principal) -> list[Schedule]:
        """See ScheduleService."""
        principal.demand("runs:read")
        return [row.shown() for row in await asyncio.to_thread(self._store.every, principal.tenant)]

    async def show(self, principal: Principal, name: str) -> Schedule:
        """See ScheduleService."""
        principal.demand("runs:read")
        return (await self._get(principal, name)).shown()

    async def pause(self, principal: Principal, name: str) -> bool:
        """See ScheduleService."""
        principal.demand("runs:write")
        row = await self._get(principal, name)
        return await asyncio.to_thread(self._store.set_paused, row, paused=True, next_s=row.next_s)

    async def resume(self, principal: Principal, name: str) -> bool:
        """See ScheduleService."""
        principal.demand("runs:write")
        row = await self._get(principal, name)
        next_s = next_due(row.rule, self._clock.time_s(), anchor_s=row.anchor_s)
        return await asyncio.to_thread(self._store.set_paused, row, paused=False, next_s=next_s)

    async def remove(self, principal: Principal, name: str) -> None:
        """See ScheduleService."""
        principal.demand("runs:write")
        await asyncio.to_thread(self._store.remove, principal.tenant, name)

    async def _get(self, principal: Principal, name: str) -> Row:
        return await asyncio.to_thread(self._store.get, principal.tenant, name)

    # ---- once a second -----------------------------------------------------------------------------------

    async def fire_due(self) -> None:
        """Make the runs whose time has come."""
        for row in await asyncio.to_thread(self._store.due):
            try:
                await self._attend(row)
            except AgenticFlowError as error:  # one that cannot be kept must not hold up the others
                log.warning("schedule_delayed", tenant=row.tenant, schedule=row.name, error=error.message)

    async def _attend(self, row: Row) -> None:
        if row.firing_s is not None:
            await self._fire(row, row.firing_s)
            return
        now_s = self._clock.time_s()
        found = due(row.rule, row.next_s, now_s, anchor_s=row.anchor_s)
        if found is None:
            next_s = next_due(row.rule, now_s, anchor_s=min(row.anchor_s, now_s))
            await asyncio.to_thread(self._store.begin_again, row, next_s)
            return
        if found.fire_s is None:
            note = f"nobody was there at {_told(row.next_s)}, nor soon enough after"
            await asyncio.to_thread(self._store.pass_over, row, found.next_s, note)
            return
        if row.rule.overlap == "skip" and row.last_run_id is not None:
            state = await self._state_of(row.last_run_id)
            if state is not None and state not in _ENDED:
                note = f"at {_told(found.fire_s)} run {row.last_run_id} was {state}"
                await asyncio.to_thread(self._store.pass_over, row, found.next_s, note)
                return
        if await asyncio.to_thread(self._store.note_firing, row, found.fire_s, found.next_s):
            await self._fire(row, found.fire_s)

    async def _fire(self, row: Row, fire_s: float) -> None:
        """Submit the run of a due time that is noted; the same one, however many processes do."""
        try:
            run_id = await self._submit(
                row.principal,
                row.request.run(),
                idempotency_key=f"schedule {row.schedule_id} at {fire_s!r}",
            )
        except AgenticFlowError as error:
            if error.retryable and self._clock.time_s() <= fire_s + row.rule.catch_up_s:
                raise
            log.warning("schedule_failed", tenant=row.tenant, schedule=row.name, error=error.message)
            note = f"at {_told(fire_s)}: {error.message}"[:1000]
            await asyncio.to_thread(self._store.failed, row, fire_s, note)
            return
        await asyncio.to_thread(self._store.fired, row, fire_s, run_id)
        log.info("schedule_fired", tenant=row.tenant, schedule=row.name, run_id=run_id)


def _told(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
