"""Trajectories: what each run tried, what it observed and how it ended, kept for learning.

Stored through the VectorStore port in the tenant's `trajectories` namespace, so that they can be found by
task and live under the same durability, isolation and erasure as everything else.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from agentic_flow.core.messages import Frozen
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Item, SearchQuery

NAMESPACE = "trajectories"
_STEPS_MAX = 400
_OBSERVATION_CHARS_MAX = 500


class TrajectoryStep(Frozen):
    """One recorded model or tool call of an agent; `observation` is the head of what came back."""

    agent: str
    name: str
    observation: str = ""
    error: str | None = None


class Trajectory(Frozen):
    """One run as experience. `outcome` is what the run itself knows; verdicts come from judges."""

    run_id: str
    task: str
    model: str
    topology: str
    outcome: Literal["completed", "failed"]
    steps: tuple[TrajectoryStep, ...] = ()
    steps_total: int = 0
    answer: str = ""
    error: str | None = None
    usage: dict[str, Any] = Field(default_factory=dict[str, Any])
    recorded_at_s: float = 0.0


class Trajectories:
    """Stores and finds trajectories of a tenant."""

    def __init__(self, store: VectorStore) -> None:
        self._store = store

    async def record(self, tenant: str, trajectory: Trajectory) -> None:
        """Store it durably; recording the same run again replaces it."""
        bounded = trajectory.model_copy(
            update={
                "steps": tuple(
                    step.model_copy(update={"observation": step.observation[:_OBSERVATION_CHARS_MAX]})
                    for step in trajectory.steps[:_STEPS_MAX]
                ),
                "steps_total": len(trajectory.steps),
            }
        )
        await self._store.create_namespace(tenant, NAMESPACE)
        item = Item(
            id=trajectory.run_id,
            text=trajectory.task,
            metadata=bounded.model_dump(mode="json", exclude={"task"}),
        )
        await self._store.upsert(tenant, NAMESPACE, [item])

    async def get(self, tenant: str, run_id: str) -> Trajectory | None:
        """The trajectory of a run, or None when it left none."""
        if not await self._exists(tenant):
            return None
        items = await self._store.get(tenant, NAMESPACE, [run_id])
        return _parse(items[0]) if items else None

    async def similar(self, tenant: str, task: str, *, k: int = 5) -> list[Trajectory]:
        """Past trajectories of tasks like this one, nearest first."""
        if not await self._exists(tenant):
            return []
        found = await self._store.search(tenant, NAMESPACE, SearchQuery(text=task, k=k))
        return [_parse(hit.item) for hit in found.hits]

    async def _exists(self, tenant: str) -> bool:
        return any(namespace.name == NAMESPACE for namespace in await self._store.namespaces(tenant))


def _parse(item: Item) -> Trajectory:
    return Trajectory.model_validate({**item.metadata, "task": item.text})
