"""Connections to the run database."""

from __future__ import annotations

import time
from pathlib import Path

from agentic_flow.swarm.leases import RunDatabase


def test_milliseconds_since_the_epoch_on_every_sqlite(tmp_path: Path) -> None:
    """Catches an SQLite older than 3.42 under Python 3.12 or newer: the run database could not be made."""
    database = RunDatabase(None, tmp_path, pooled=False)
    rows = database.rows("SELECT CAST(unixepoch('subsec') * 1000 AS INTEGER)")
    database.close()
    assert abs(rows[0][0] / 1000 - time.time()) < 60
