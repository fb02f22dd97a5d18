"""The audit log in its real file: durable, chained, shared by processes, and what tampering shows."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.tools.audit import GENESIS, REDACTED, AuditLog, Entry, redacted


def entry(number: int, **changes: Any) -> Entry:
    values: dict[str, Any] = {
        "at_s": 1000.0 + number,
        "tenant": "default",
        "subject": "tester",
        "run_id": "run-1",
        "agent": None,
        "tool": "file_read",
        "idempotency_key": None,
        "arguments": {"path": f"f{number}.txt"},
        "decision": "allow:default",
        "outcome": "ok",
        "duration_s": 0.5,
    }
    return Entry(**(values | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def log(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(path)
    yield log
    log.close()


def fill(log: AuditLog, count: int) -> None:
    async def append() -> None:
        for number in range(1, count + 1):
            assert await log.append(entry(number)) == number

    asyncio.run(append())


def test_chain_is_whole_and_linked(log: AuditLog) -> None:
    """Catches records that are not chained, or a verification that fails on honest logs."""
    assert asyncio.run(log.verify()) is None
    assert asyncio.run(log.head()) == (0, GENESIS)
    fill(log, 5)
    records = asyncio.run(log.records("default"))
    assert [record.sequence for record in records] == [1, 2, 3, 4, 5]
    assert records[0].previous_hash == GENESIS
    assert all(b.previous_hash == a.hash for a, b in pairwise(records))
    assert asyncio.run(log.head()) == (5, records[-1].hash)
    assert asyncio.run(log.verify()) is None


def change(column: str, value: Any) -> str:
    shown = f"'{value}'" if isinstance(value, str) else str(value)
    return f"UPDATE audit SET {column} = {shown} WHERE sequence = 3"


TAMPERINGS: list[tuple[str, str, int]] = [
    *(
        (column, change(column, value), 3)
        for column, value in {
            "at_s": 5.0,
            "tenant": "other",
            "subject": "nobody",
            "run_id": "run-2",
            "agent": "a",
            "tool": "file_write",
            "idempotency_key": "k",
            "arguments_sha256": "0",
            "arguments": "{}",
            "decision": "deny:rule 1",
            "outcome": "error",
            "error_code": "x",
            "duration_s": 9.0,
            "previous_hash": GENESIS,
            "hash": GENESIS,
        }.items()
    ),
    ("deleted", "DELETE FROM audit WHERE sequence = 3", 3),
    ("first deleted", "DELETE FROM audit WHERE sequence = 1", 1),
    ("last deleted", "DELETE FROM audit WHERE sequence = 5", 5),
    ("all deleted", "DELETE FROM audit", 1),
    (
        "reordered",
        "UPDATE audit SET sequence = 100 WHERE sequence = 2;"
        "UPDATE audit SET sequence = 2 WHERE sequence = 3;"
        "UPDATE audit SET sequence = 3 WHERE sequence = 100",
        2,
    ),
    (
        "closed up",
        "DELETE FROM audit WHERE sequence = 3; UPDATE audit SET sequence = sequence - 1 WHERE sequence > 3",
        3,
    ),
    ("inserted before", "INSERT INTO audit SELECT -1, " + ", ".join(
        "at_s tenant subject run_id agent tool idempotency_key arguments_sha256 arguments decision outcome "
        "error_code duration_s previous_hash hash".split()) + " FROM audit WHERE sequence = 1", -1),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "broken"), [case[1:] for case in TAMPERINGS], ids=[c[0] for c in TAMPERINGS])
def test_tampering_is_found_where_it_begins(log: AuditLog, path: Path, sql: str, broken: int) -> None:
    """Catches a column outside the hash, and removed, moved or inserted records that pass."""
    fill(log, 5)
    connection = sqlite3.connect(path)
    connection.executescript(sql)
    connection.close()
    assert asyncio.run(log.verify()) == broken


def test_other_tenants_records_are_not_shown(log: AuditLog) -> None:
    """Catches a log that leaks across the tenant wall."""

    async def work() -> None:
        await log.append(entry(1))
        await log.append(entry(2, tenant="other", run_id="run-9"))
        assert [r.sequence for r in await log.records("other")] == [2]
        assert await log.records("default", run_id="run-9") == []
        assert [r.sequence for r in await log.records("default", run_id="run-1", after=0, limit=1)] == [1]

    asyncio.run(work())


APPENDER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_tools_audit import entry
from agentic_flow.tools.audit import AuditLog
async def main():
    log = AuditLog(Path(sys.argv[1]))
    print("ready", flush=True); sys.stdin.readline()
    for _ in range(15):
        await asyncio.gather(*(log.append(entry(n)) for n in range(10)))
    log.close()
asyncio.run(main())
"""


def test_two_processes_extend_one_chain(log: AuditLog, path: Path) -> None:
    """Catches two processes that chain to the same record, or lose one another's."""
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", APPENDER, str(path), here],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=60)
        assert process.returncode == 0
    assert asyncio.run(log.head())[0] == 300
    assert asyncio.run(log.verify()) is None


KEY_TEXT = "a1B2" * 6  # joined here, so that no scanner takes it for a leaked key

KILLED = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_tools_audit import entry
from agentic_flow.tools.audit import AuditLog
async def main():
    log = AuditLog(Path(sys.argv[1]))
    for number in range(1, 1000):
        os.write(1, b"%d\\n" % await log.append(entry(number)))
asyncio.run(main())
"""


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    """Catches an append that returns before it is in the file."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout.read().split()]
    log = AuditLog(path)
    try:
        assert asyncio.run(log.head())[0] >= acknowledged[-1]
        assert asyncio.run(log.verify()) is None
    finally:
        log.close()
    assert os.path.getsize(path) > 0


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        ({"password": "hunter2"}, "hunter2"),
        ({"headers": {"Authorization": "Basic abc123"}}, "abc123"),
        ({"api_key": "k-123"}, "k-123"),
        ({"note": f"use {'sk'}-{KEY_TEXT} please"}, KEY_TEXT),
        ({"argv": ["curl", "-H", "Bearer abcdefghijklmnopqrst"]}, "abcdefghijklmnopqrst"),
        ({"text": "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----"}, "MIIabc"),
        ({"text": "z" * 501}, "zzzz"),
    ],
)
def test_secrets_and_long_texts_stay_out(log: AuditLog, arguments: dict[str, Any], gone: str) -> None:
    """Catches credentials and whole files that end up readable in the log."""
    asyncio.run(log.append(entry(1, arguments=arguments)))
    [record] = asyncio.run(log.records("default"))
    assert gone not in record.arguments
    assert asyncio.run(log.verify()) is None


def test_redaction_keeps_what_is_harmless() -> None:
    """Catches redaction so broad that the log says nothing."""
    harmless = {"path": "src/tokenizer.py", "line_start": 3, "argv": ["git", "log"], "none": None}
    assert redacted(harmless) == harmless
    shown = redacted({"text": "short", "path": "a"}, frozenset({"text"}))
    assert shown["path"] == "a"
    assert set(shown["text"]) == {"chars", "sha256"}
    assert redacted({"token": "x"})["token"] == REDACTED
