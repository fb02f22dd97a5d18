"""Where a restored database comes from, and the histories that erasing a tenant in it does not reach.

A restored database has an id and a history of its own. The branch of the database it was restored from stays
as it was: that database may live on, and its backups need it. So a tenant that is erased in the restored one
may still be in there, which is to be told to whoever erases.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import apsw
from pydantic import TypeAdapter

from agentic_flow.agentdb.manifest import is_readable_file, open_live
from agentic_flow.agentdb.sealing import SEALED
from agentic_flow.core.db import rows
from agentic_flow.core.messages import Frozen

_ORIGINS = "origins"
"""Row of `about`: the databases that this one was restored from, one out of the other."""
_NEAREST = "origin_database_id"
"""Row of `about`: the last of them, in a database that was restored before there was a list."""


class Origin(Frozen):
    """A database that another was restored from.

    Args:
        database_id: Its id.
        history: The folder with its history, if the restore used one.
    """

    database_id: str
    history: Path | None = None


@dataclass(frozen=True, slots=True)
class OtherHistories:
    """Histories that erasing a tenant leaves as they are.

    Args:
        folders: Where they are, or were.
        notes: What cannot be told, in sentences.
    """

    folders: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


_LIST = TypeAdapter(list[Origin])


def read_origins(connection: apsw.Connection) -> list[Origin]:
    """The databases that this one comes from, the first of them first."""
    about: dict[str, str] = dict(
        rows(connection, "SELECT name, value FROM about WHERE name IN (?, ?)", (_ORIGINS, _NEAREST))
    )
    if _ORIGINS in about:
        return _LIST.validate_json(about[_ORIGINS])
    return [Origin(database_id=about[_NEAREST])] if _NEAREST in about else []


def add_origin(connection: apsw.Connection, database_id: str, history: Path | None) -> None:
    """Note that this database was just restored from a backup of another.

    Args:
        history: The folder with the segments that were used.
    """
    origin = Origin(database_id=database_id, history=None if history is None else history.resolve())
    origins = [*read_origins(connection), origin]
    for name, value in ((_ORIGINS, _LIST.dump_json(origins).decode()), (_NEAREST, database_id)):
        rows(connection, "INSERT OR REPLACE INTO about (name, value) VALUES (?, ?)", (name, value))


def other_histories(database: Path, history_dir: Path | None, *, in_use: bool = True) -> OtherHistories:
    """The histories beside the one that an erasure in this database reaches.

    Args:
        database: The AgentDB file; it need not exist.
        history_dir: As configured now.
        in_use: Whether tenants are erased in this file. If not, its own history is one of the others.
    """
    if not is_readable_file(database):
        return OtherHistories()
    try:
        connection = open_live(database)
        try:
            about: dict[str, str] = dict(rows(connection, "SELECT name, value FROM about"))
            origins = read_origins(connection)
        finally:
            connection.close()
    except (apsw.Error, ValueError) as error:
        return OtherHistories(notes=(f"{str(database)!r} does not say where it comes from: {error}",))
    folders: list[Path] = []
    notes: list[str] = []
    if SEALED in about:
        if history_dir is None:
            notes.append(
                "this database has a sealed history, which may hold the tenant: agentdb.history_dir is not "
                "set, so it was not erased there"
            )
        elif not in_use:
            folders.append(history_dir / about["database_id"])
    for origin in origins:
        configured = None if history_dir is None else history_dir / origin.database_id
        places = [place for place in (origin.history, configured) if place is not None]
        # One that the restore used and that is gone is told as well.
        folders += [place for place in places if place == origin.history or place.is_dir()]
        if not places:
            notes.append(
                f"this database was restored from a backup of database {origin.database_id!r}: where that "
                "kept its history, if it had one, is not known here, and it may hold the tenant"
            )
    return OtherHistories(tuple(dict.fromkeys(place.resolve() for place in folders)), tuple(notes))
