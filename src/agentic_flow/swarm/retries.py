"""A new run that takes over what another one has recorded before a step, and executes the rest.

Steps are what the top-level workflow has numbered: its own recorded steps, and its children, each with all
that is below it. What had a smaller number than the step is kept; so is what was started together with it
(one wave of agents, one round of a workflow file) and has completed, for it neither needed the step nor came
after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentic_flow.core.clock import Clock
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.sql import Connection, execute
from agentic_flow.swarm.artifact_rows import copy_artifacts
from agentic_flow.swarm.event_log import EventRow, append, event, recorded_events
from agentic_flow.swarm.leases import TREE, RunDatabase, check_readable, tree_of
from agentic_flow.swarm.scheduling import ENDED

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_NAMES_MAX = 30


@dataclass(frozen=True, slots=True)
class Part:
    """A step of a top-level workflow, or a child of it.

    `name` is the step's or the child's key, `child_id` None for a step, `status` a step's `completed` or
    `failed`, `started_at_s` the same for all children that were started together.
    """

    number: int
    name: str
    status: str
    child_id: str | None = None
    started_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What a retry takes over: steps below the number `before`, and these children.

    `from_step`: where it begins; "" for what was not recorded yet.
    """

    from_step: str
    before: int
    children: tuple[str, ...]


def kept_of(run_id: str, status: str, parts: Sequence[Part], from_step: str | None) -> Kept:
    """What is kept of a run.

    Args:
        run_id: The run.
        status: How it ended.
        parts: All that it has recorded.
        from_step: A step's name or a child's key; `name` also stands for `name-1`, `name-2` and so on, which
            were started together. None: the first that did not complete.

    Raises:
        NotFound: there is no such step.
        Conflict: none is named, and all have completed.
    """
    ordered = sorted(parts, key=lambda part: part.number)
    if from_step is None:
        first = next((part for part in ordered if part.status != "completed"), None)
        if first is None and status == "cancelled":  # what was under way has left no record
            children = tuple(part.child_id for part in ordered if part.child_id is not None)
            return Kept("", 2 * ordered[-1].number + 2 if ordered else 1, children)
        if first is None:
            raise Conflict(
                f"no step of run {run_id!r} has failed",
                hint=f"name the one to begin with (--from): {_names(ordered)}",
            )
    else:
        first = next((part for part in ordered if from_step in (part.name, _stem(part))), None)
        if first is None:
            raise NotFound(
                f"run {run_id!r} has recorded no step {from_step!r}", hint=f"there are {_names(ordered)}"
            )

    def is_kept(child: Part) -> bool:
        if child.number < first.number:
            return child.status in ("completed", "failed")
        together = first.child_id is not None and child.started_at_s == first.started_at_s
        asked = from_step is not None and from_step in (child.name, _stem(child))
        return together and child.status == "completed" and child != first and not asked

    children = [part for part in ordered if part.child_id is not None and is_kept(part)]
    return Kept(from_step or first.name, first.number, tuple(str(child.child_id) for child in children))


def _stem(part: Part) -> str | None:
    """What an item of a fan-out is an item of."""
    stem, hyphen, number = part.name.rpartition("-")
    return stem if part.child_id is not None and hyphen and number.isdigit() else None


def _names(parts: Sequence[Part]) -> str:
    names = list(dict.fromkeys(part.name for part in parts))
    more = "" if len(names) <= _NAMES_MAX else f" and {len(names) - _NAMES_MAX} more"
    return (", ".join(names[:_NAMES_MAX]) + more) or "none: start a new run"


class Retries:
    """Copies of ended runs of one run database.

    Args:
        database: Where they are.
        clock: Stamps the new ones.
    """

    def __init__(self, database: RunDatabase, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def accept(
        self, workflow_id: str, new_id: str, payload: str, *, from_step: str | None, executor_id: str
    ) -> float | None:
        """Store the new run with what it keeps, as this process's.

        Returns:
            When it was accepted, or None when its id is taken.

        Raises:
            NotFound: the run or the step is not there.
            Conflict: the run has not ended, or no step of it has failed.
            NeedsNewer: a newer build has worked on it.
        """
        with self._database.transaction() as connection:
            old = execute(
                connection,
                "SELECT status, version, name, tenant, priority FROM af_workflows "
                f"WHERE workflow_id = :id AND parent_id IS NULL{self._database.for_update}",
                id=workflow_id,
            ).first()
            if old is None:
                raise NotFound(
                    f"there is no run {workflow_id!r}", hint="list them with `agentic-flow runs list`"
                )
            if old[0] not in ENDED:
                raise Conflict(
                    f"run {workflow_id!r} has not ended", hint="resume it, or cancel it before you retry it"
                )
            check_readable(workflow_id, str(old[1]))
            kept = kept_of(workflow_id, str(old[0]), _parts(connection, workflow_id), from_step)
            now_s = self._clock.time_s()
            stored = connection.execute(
                "INSERT INTO af_workflows (workflow_id, root_id, name, version, tenant, priority, status, "
                "epoch, executor_id, payload, takeovers, accepted_at_s, updated_at_s) VALUES (:id, :id, "
                ":name, :version, :tenant, :priority, 'queued', 1, :me, :payload, 0, :now, :now) "
                "ON CONFLICT DO NOTHING",
                {
                    "id": new_id,
                    "name": old[2],
                    "version": old[1],
                    "tenant": old[3],
                    "priority": old[4],
                    "me": executor_id,
                    "payload": payload,
                    "now": now_s,
                },
            )
            if stored.rowcount != 1:
                return None
            self._copy(connection, workflow_id, new_id, kept)
            data: JsonObject = {"retry_of": workflow_id, "from_step": kept.from_step}
            accepted = event(new_id, new_id, "accepted", now_s, str(old[2]), data)
            told: list[EventRow] = [accepted, *recorded_events(connection, new_id)]
            append(connection, told, new=(new_id,), sqlite=self._database.is_sqlite)
        return now_s

    def _copy(self, connection: Connection, old_id: str, new_id: str, kept: Kept) -> None:
        """The records that are kept, under new ids."""
        columns = self._columns(connection, "af_steps", besides=("workflow_id",))
        as_new: dict[str, Any] = {"new": new_id, "behind": len(old_id) + 1}
        renamed = "CAST(:new AS TEXT) || substr({}, CAST(:behind AS INTEGER))"
        execute(
            connection,
            f"INSERT INTO af_steps (workflow_id, {columns}) SELECT CAST(:new AS TEXT), {columns} "
            "FROM af_steps WHERE workflow_id = :old AND step_index < :before",
            new=new_id,
            old=old_id,
            before=kept.before,
        )
        own = {"old": old_id, "before": kept.before}
        kinds = self._columns(connection, "af_artifacts", besides=("root_id", "number", "workflow_id"))
        copy_artifacts(connection, kinds, as_new, "workflow_id = :old AND step_index < :before", own)
        same = self._columns(connection, "af_workflows", besides=("workflow_id", "root_id", "parent_id"))
        for child in kept.children:
            execute(
                connection,
                f"INSERT INTO af_workflows (workflow_id, root_id, parent_id, {same}) "
                f"SELECT {renamed.format('workflow_id')}, CAST(:new AS TEXT), {renamed.format('parent_id')}, "
                f"{same} FROM af_workflows WHERE {TREE}",
                **as_new,
                **tree_of(child),
            )
            execute(
                connection,
                f"INSERT INTO af_steps (workflow_id, {columns}) "
                f"SELECT {renamed.format('workflow_id')}, {columns} FROM af_steps "
                f"WHERE workflow_id IN (SELECT workflow_id FROM af_workflows WHERE {TREE})",
                **as_new,
                **tree_of(child),
            )
            tree = f"workflow_id IN (SELECT workflow_id FROM af_workflows WHERE {TREE})"
            copy_artifacts(connection, kinds, as_new, tree, tree_of(child))

    def _columns(self, connection: Connection, table: str, *, besides: Sequence[str]) -> str:
        """All that are copied as they are, those of newer builds too."""
        return ", ".join(name for name in self._database.columns(connection, table) if name not in besides)


def _parts(connection: Connection, run_id: str) -> list[Part]:
    steps = execute(
        connection,
        "SELECT step_index, name, error IS NOT NULL FROM af_steps WHERE workflow_id = :id",
        id=run_id,
    )
    parts = [Part(int(row[0]), str(row[1]), "failed" if row[2] else "completed") for row in steps]
    children = execute(
        connection,
        "SELECT workflow_id, parent_step, status, accepted_at_s FROM af_workflows "
        "WHERE parent_id IS NOT NULL AND root_id = :id AND parent_id = :id",
        id=run_id,
    )
    for child_id, number, status, started_at_s in children:
        if number is not None:
            key = str(child_id).removeprefix(f"{run_id}.")
            parts.append(Part(int(number), key, str(status), str(child_id), float(started_at_s)))
    return parts
