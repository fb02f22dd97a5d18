"""Databases of one table, and looks at any: for tests of backups.

By apsw alone: two SQLite libraries in one process end each other's locks.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from agentic_flow.core.db import Database, rows


def column(file: Path, sql: str) -> list[Any]:
    """The one column of a query."""
    with closing(apsw.Connection(str(file))) as connection:
        return [value for (value,) in rows(connection, sql)]


def database(path: Path) -> Database:
    """A database with the table `kept`."""
    return Database(path, ("CREATE TABLE kept (value TEXT NOT NULL) STRICT",))


def add(path: Path, value: str, *, busy_timeout_s: float = 10.0) -> None:
    """Store a value."""
    with closing(apsw.Connection(str(path))) as connection:
        connection.set_busy_timeout(int(busy_timeout_s * 1000))
        rows(connection, "INSERT INTO kept VALUES (?)", (value,))
