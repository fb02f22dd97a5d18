"""What a schedule of a workflow is, and who keeps them: as callers see it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, StringConstraints

from agentic_flow.core.auth import Principal
from agentic_flow.core.messages import Frozen, JsonObject
from agentic_flow.swarm.runs import Priority, QueueName
from agentic_flow.swarm.schedule_rule import ScheduleRule
from agentic_flow.swarm.workflow_spec import WorkflowRequest, WorkflowSource

SCHEDULES_MAX = 1000
"""Of one tenant."""

ScheduleName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class ScheduleRequest(WorkflowSource):
    """A workflow that is to run by the `schedule` in it, with these inputs; `name` None: the workflow's."""

    name: ScheduleName | None = None
    inputs: JsonObject = Field(default_factory=dict[str, Any])
    queue: QueueName | None = None
    priority: Priority = 0

    def run(self) -> WorkflowRequest:
        """What is submitted each time."""
        return WorkflowRequest(**self.model_dump(exclude={"name"}, exclude_unset=True))


class Schedule(Frozen):
    """A schedule as it stands.

    `next_at_s` is when it is due, None while it is paused; `last_at_s` the due time for which it ran last, as
    `last_run_id`. `fired` counts its runs, `skipped` what was passed over for the reason in `note` (the last
    one's): the run before was unfinished, nobody was there in time, or it could not be started.
    """

    name: str
    workflow: str
    rule: ScheduleRule
    state: Literal["active", "paused"]
    inputs: dict[str, Any]
    queue: str | None
    priority: int
    subject: str
    next_at_s: float | None
    last_at_s: float | None
    last_run_id: str | None
    fired: int
    skipped: int
    note: str
    created_at_s: float


class ScheduleService(Protocol):
    """Schedules of the principal's tenant; another tenant's do not exist (NotFound)."""

    async def add(self, principal: Principal, request: ScheduleRequest) -> Schedule:
        """Keep a schedule. Its runs are made in the name of whoever added it, with the rights of now.

        Raises:
            InvalidInput: the workflow, its inputs or its schedule is wrong, or it has none.
            PathNotFound: a folder does not exist.
            Conflict: there is one of this name.
            LimitExceeded: there are too many.
        """
        ...

    async def every(self, principal: Principal) -> list[Schedule]:
        """All, by name."""
        ...

    async def show(self, principal: Principal, name: str) -> Schedule: ...

    async def pause(self, principal: Principal, name: str) -> bool:
        """Let it make no more runs; what runs goes on. False when it is paused already."""
        ...

    async def resume(self, principal: Principal, name: str) -> bool:
        """Let it go on with its next time, not with those of the pause. False when it is active."""
        ...

    async def remove(self, principal: Principal, name: str) -> None:
        """Forget it; its runs stay."""
        ...
