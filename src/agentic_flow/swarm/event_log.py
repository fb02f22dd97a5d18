"""The event log of runs: what happened in a tree of workflows, numbered from 1 without gaps.

A row is written in the transaction that does what it tells of, while that holds its top-level row: so
numbers follow the order of the commits, and a reader that has seen number n misses nothing by asking for
what is above.

Runs of builds that kept no log have their events made up from what is stored (`made_up`), in an order that
depends on stored times alone. Before anything is added to such a run they are written down (`written_down`)
and keep their numbers; until then a step that the older build commits late can still move them.
"""

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import orjson

from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import EventKind, EventRecord
from agentic_flow.core.sql import Connection, execute

_INSERT = "INSERT INTO af_events (root_id, sequence, kind, at_s, agent, name, data) VALUES "
_COLUMNS = "root_id, kind, at_s, agent, name, data"
_SERVER_MARKS = "(%s, %s, %s, %s, %s, %s, %s)"
_STEPS_ENDS = {"step_finished": 1, "child_ended": 2, "cancelled": 3, "ended": 3}

EventRow = tuple[str, EventKind, float, str, str, str]
"""Run, kind, time, agent, name and data (JSON text); its number comes when it is stored."""


def create_events(*, sqlite: bool) -> str:
    """The statement that makes the table; on SQLite without row numbers, a second tree to write to."""
    return (
        "CREATE TABLE IF NOT EXISTS af_events (root_id TEXT NOT NULL, sequence INTEGER NOT NULL, "
        "kind TEXT NOT NULL, at_s DOUBLE PRECISION NOT NULL, agent TEXT NOT NULL, name TEXT NOT NULL, "
        f"data TEXT NOT NULL, PRIMARY KEY (root_id, sequence)){' WITHOUT ROWID' if sqlite else ''}"
    )


def event(
    root_id: str,
    workflow_id: str,
    kind: EventKind,
    at_s: float,
    name: str,
    data: JsonObject | str | None = None,
) -> EventRow:
    """One event.

    Args:
        root_id: The top-level workflow of the tree.
        workflow_id: The workflow it happened to.
        kind: What happened.
        at_s: When, in seconds since 1970.
        name: The step's or the workflow's.
        data: More about it, also as JSON text.
    """
    text = data if isinstance(data, str) else orjson.dumps(data).decode() if data else "{}"
    return (root_id, kind, at_s, workflow_id[len(root_id) + 1 :], name, text)


def append(
    connection: Connection,
    rows: Sequence[EventRow],
    *,
    new: Collection[str] = (),
    sqlite: bool,
    again: bool = False,
) -> None:
    """Number and store events, in their order. The caller's transaction holds their top-level rows.

    Args:
        connection: In a transaction.
        rows: From `event`.
        new: Runs that this transaction has accepted: they have no events.
        sqlite: Which database it is: with the driver's own marks a row costs half.
        again: An attempt before this one failed, perhaps only in its answer: leave out what is there.
    """
    roots = {row[0] for row in rows}.difference(new)
    if again and roots:
        found = execute(connection, f"SELECT {_COLUMNS} FROM af_events WHERE root_id IN :roots", roots=roots)
        known = {tuple(row) for row in found}
        rows = [row for row in rows if row not in known]
    if not rows:
        return
    last = _last_numbers(connection, list(roots))
    numbered: list[tuple[Any, ...]] = []
    for root_id, *rest in rows:
        last[root_id] = number = last.get(root_id, 0) + 1
        numbered.append((root_id, number, *rest))
    connection.exec_driver_sql(_INSERT + ("(?, ?, ?, ?, ?, ?, ?)" if sqlite else _SERVER_MARKS), numbered)


def _last_numbers(connection: Connection, roots: list[str]) -> dict[str, int]:
    if not roots:
        return {}
    last = "SELECT MAX(sequence) FROM af_events WHERE root_id ="
    if len(roots) == 1:
        return {roots[0]: connection.execute(f"{last} :id", {"id": roots[0]}).scalar_one() or 0}
    found = execute(
        connection,
        # One seek for each, where GROUP BY would read all events of these runs.
        f"SELECT workflow_id, ({last} workflow_id) FROM af_workflows WHERE workflow_id IN :roots",
        roots=tuple(roots),
    )
    return {str(row[0]): int(row[1] or 0) for row in found}


def written_down(connection: Connection, root_id: str, *, sqlite: bool) -> None:
    """Store the made-up events of a run that has none. The caller's transaction holds its top-level row."""
    if not _is_known(connection, root_id):
        append(connection, _made_up_rows(connection, root_id), new=(root_id,), sqlite=sqlite)


def events_of(connection: Connection, root_id: str, after: int, *, has_log: bool = True) -> list[EventRecord]:
    """Events of a run with a number above `after`, in order.

    Args:
        connection: To a database with runs.
        root_id: The run.
        after: A number that the caller has seen, or 0.
        has_log: Whether there is a table of events: an older build's database has none until it is opened.
    """
    if has_log:
        found = execute(
            connection,
            "SELECT sequence, kind, at_s, agent, name, data FROM af_events "
            "WHERE root_id = :id AND sequence > :after ORDER BY sequence",
            id=root_id,
            after=after,
        )
        events = [_record(root_id, *row) for row in found]
        if events or _is_known(connection, root_id):
            return events
    rows = _made_up_rows(connection, root_id)
    return [_record(root_id, number, *row[1:]) for number, row in enumerate(rows, start=1) if number > after]


def _is_known(connection: Connection, root_id: str) -> bool:
    found = execute(connection, "SELECT 1 FROM af_events WHERE root_id = :id AND sequence = 1", id=root_id)
    return found.first() is not None


def _record(
    root_id: str, sequence: int, kind: EventKind, at_s: float, agent: str, name: str, data: str
) -> EventRecord:
    return EventRecord(root_id, int(sequence), kind, float(at_s), str(agent), str(name), orjson.loads(data))


def recorded_events(connection: Connection, root_id: str) -> list[EventRow]:
    """What the stored steps and children of a new run tell of, apart from its acceptance."""
    return [row for row in _made_up_rows(connection, root_id) if row[1] != "accepted"]


def _made_up_rows(connection: Connection, root_id: str) -> list[EventRow]:
    workflows = execute(
        connection,
        "SELECT workflow_id, name, status, accepted_at_s, started_at_s, COALESCE(ended_at_s, updated_at_s), "
        "error FROM af_workflows WHERE root_id = :id",
        id=root_id,
    )
    steps = execute(
        connection,
        "SELECT workflow_id, step_index, name, error, completed_at_s FROM af_steps WHERE workflow_id IN "
        "(SELECT workflow_id FROM af_workflows WHERE root_id = :id)",
        id=root_id,
    )
    return made_up(root_id, [tuple(row) for row in workflows], [tuple(row) for row in steps])


def made_up(
    root_id: str, workflows: Sequence[Sequence[Any]], steps: Sequence[Sequence[Any]]
) -> list[EventRow]:
    """The events of a run that was executed without a log, as far as what is stored tells of them.

    Args:
        root_id: The top-level workflow.
        workflows: Id, name, status, times of acceptance, start and end, and error of it and all below it.
        steps: Workflow id, number, name, error and time of completion of all recorded steps.
    """
    events: list[tuple[float, int, str, int, EventRow]] = []

    def add(
        order: int, index: int, at_s: float, workflow_id: str, kind: EventKind, name: str, data: Any
    ) -> None:
        row = event(root_id, workflow_id, kind, at_s, name, data)
        events.append((at_s, order, workflow_id, index, row))

    for workflow_id, name, status, accepted_at_s, started_at_s, ended_at_s, error in workflows:
        is_root = workflow_id == root_id
        add(-2, 0, accepted_at_s, workflow_id, "accepted" if is_root else "child_started", name, None)
        if is_root and started_at_s is not None:
            add(-1, 0, max(started_at_s, accepted_at_s), workflow_id, "started", name, None)
        if status in ("completed", "failed", "cancelled"):
            kind: EventKind = "cancelled" if status == "cancelled" else "ended" if is_root else "child_ended"
            add(
                _STEPS_ENDS[kind],
                0,
                ended_at_s,
                workflow_id,
                kind,
                name,
                end_data(status, None if is_root else error),
            )
    for workflow_id, index, name, error, completed_at_s in steps:
        add(1, index, completed_at_s or 0.0, workflow_id, "step_finished", name, step_data(index, error))
    # The beginning comes first and the end last even where clocks say otherwise.
    events.sort(key=lambda each: (_place(each[4]), *each[:4]))
    return [each[4] for each in events]


def _place(row: EventRow) -> int:
    _, kind, _, agent, _, _ = row
    if kind in ("accepted", "started"):
        return 0
    return 2 if agent == "" and kind in ("ended", "cancelled") else 1


def step_data(index: int, error: str | None) -> str:
    """Data of `step_finished`: the step's number, and the problem it ended with (JSON texts)."""
    return f'{{"index":{index}}}' if error is None else f'{{"index":{index},"error":{error}}}'


def end_data(status: str, error: str | None) -> str:
    """Data of `ended` and `child_ended`: the state, and a child's problem (JSON texts)."""
    return f'{{"state":"{status}"}}' if error is None else f'{{"state":"{status}","error":{error}}}'
