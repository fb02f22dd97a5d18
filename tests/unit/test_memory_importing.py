"""Reading other programs' memories: what is taken, what is not and why, and that damage gives nothing."""

from __future__ import annotations

import gzip
import json
import sqlite3
import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agentic_flow.core.errors import DataCorrupted, InvalidInput, PathNotFound
from agentic_flow.memory.foreign_tables import (
    Unusable,
    episode_trajectory,
    moment_s,
    pattern_item,
    reasoning_item,
    skill_item,
    task_trajectory,
)
from agentic_flow.memory.importing import MemoryFile, read_memory_file

NOW_S = 1_790_000_000.0
_REASONINGBANK = """
CREATE TABLE patterns (id TEXT PRIMARY KEY, type TEXT NOT NULL, pattern_data TEXT NOT NULL,
    confidence REAL NOT NULL DEFAULT 0.5, usage_count INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, last_used TEXT);
CREATE TABLE pattern_embeddings (id TEXT PRIMARY KEY, model TEXT NOT NULL, dims INTEGER NOT NULL,
    vector BLOB NOT NULL, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE pattern_links (src_id TEXT NOT NULL, dst_id TEXT NOT NULL, relation TEXT NOT NULL,
    weight REAL NOT NULL DEFAULT 1.0, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE task_trajectories (task_id TEXT PRIMARY KEY, agent_id TEXT NOT NULL, query TEXT NOT NULL,
    trajectory_json TEXT NOT NULL, started_at TEXT, ended_at TEXT, judge_label TEXT, judge_conf REAL,
    judge_reasons TEXT, matts_run_id TEXT, created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP);
CREATE TABLE memory_entries (id INTEGER PRIMARY KEY, key TEXT, value TEXT);
"""
_AGENTDB = """
CREATE TABLE reasoning_patterns (id INTEGER PRIMARY KEY AUTOINCREMENT, ts INTEGER, task_type TEXT NOT NULL,
    approach TEXT NOT NULL, success_rate REAL NOT NULL DEFAULT 0.0, uses INTEGER DEFAULT 0,
    avg_reward REAL DEFAULT 0.0, tags TEXT, metadata TEXT);
CREATE TABLE pattern_embeddings (pattern_id INTEGER PRIMARY KEY, embedding BLOB NOT NULL);
CREATE TABLE episodes (id INTEGER PRIMARY KEY AUTOINCREMENT, ts INTEGER NOT NULL, session_id TEXT NOT NULL,
    task TEXT NOT NULL, input TEXT, output TEXT, critique TEXT, reward REAL DEFAULT 0.0,
    success BOOLEAN DEFAULT 0, latency_ms INTEGER, tokens_used INTEGER, tags TEXT, metadata JSON,
    created_at INTEGER NOT NULL DEFAULT 0);
CREATE TABLE skills (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, description TEXT,
    signature JSON NOT NULL, code TEXT, success_rate REAL DEFAULT 0.0, uses INTEGER DEFAULT 0,
    avg_reward REAL, avg_latency_ms INTEGER, created_from_episode INTEGER,
    created_at INTEGER NOT NULL DEFAULT 0, updated_at INTEGER NOT NULL DEFAULT 0, last_used_at INTEGER,
    metadata JSON);
CREATE TABLE facts (id INTEGER PRIMARY KEY, subject TEXT, predicate TEXT, object TEXT);
"""


def pattern(title: str, outcome: str = "Success", content: str = "Read the error first.") -> str:
    return json.dumps(
        {
            "title": title,
            "description": "When a build fails.",
            "content": content,
            "source": {"task_id": "task-1", "agent_id": "a", "outcome": outcome, "evidence": []},
            "tags": ["build", "build"],
            "domain": "ci",
            "confidence": 0.6,
            "n_uses": 3,
        }
    )


def reasoningbank(path: Path) -> Path:
    """A file as the ports write it, float32 vectors included."""
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_REASONINGBANK)
        columns = "id, type, pattern_data, created_at"
        add = f"INSERT INTO patterns ({columns}) VALUES (?, ?, ?, '2026-01-02 03:04:05')"
        database.execute(add, ("p1", "reasoning_memory", pattern("Read the first error")))
        database.execute(
            add,
            ("p2", "reasoning_memory", pattern("Ignore warnings", "Failure", "Mail bob@example.com first.")),
        )
        database.execute(add, ("p3", "reasoning_memory", "{not json"))
        database.execute(add, ("p4", "edit-style", pattern("An edit")))
        for name in ("p1", "p2"):
            vector = struct.pack("<4f", 0.1, 0.2, 0.3, 0.4)
            database.execute(
                "INSERT INTO pattern_embeddings (id, model, dims, vector) VALUES (?, 'm', 4, ?)",
                (name, vector),
            )
        database.execute("INSERT INTO pattern_links VALUES ('p1', 'p2', 'contradicts', 1, '')")
        database.execute("INSERT INTO pattern_links VALUES ('p1', 'p3', 'duplicate_of', 1, '')")
        steps = json.dumps({"steps": [{"action": "run tests", "result": "2 failed"}, {"tool": "edit"}]})
        database.execute(
            "INSERT INTO task_trajectories VALUES ('task-1', 'coder', 'Make the build pass', ?, "
            "'2026-01-02T03:00:00Z', '2026-01-02T03:10:00Z', 'Success', 0.9, '[\"all green\"]', NULL, '')",
            (steps,),
        )
        database.execute("INSERT INTO memory_entries (key, value) VALUES ('k', 'v')")
        database.commit()
    return path


def agentdb(path: Path) -> Path:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(_AGENTDB)
        database.execute(
            "INSERT INTO reasoning_patterns (ts, task_type, approach, success_rate, uses, tags) "
            "VALUES (1767000000, 'code_review', 'Look at the tests first', 0.8, 200, '[\"review\"]')"
        )
        database.execute("INSERT INTO pattern_embeddings VALUES (1, ?)", (struct.pack("<2f", 1, 0),))
        database.execute(
            "INSERT INTO episodes (ts, session_id, task, input, output, critique, reward, success) "
            "VALUES (1767000000, 's1', 'Fix the login', 'code', 'patched', 'Should ask for a log', 0.2, 0)"
        )
        database.execute(
            "INSERT INTO skills (name, signature, code, uses) VALUES ('deploy', '{}', 'make deploy', 0)"
        )
        database.execute("INSERT INTO facts VALUES (1, 'a', 'b', 'c')")
        database.commit()
    return path


def left_out(found: MemoryFile) -> dict[tuple[str, str], int]:
    return {(entry.where, entry.why): entry.count for entry in found.left_out}


def test_reasoningbank_file(tmp_path: Path) -> None:
    """Catches patterns read wrongly (lesson, provenance, time), or rows that vanish without a word."""
    found = read_memory_file(reasoningbank(tmp_path / "memory.db"), now_s=NOW_S)
    assert found.format == "reasoningbank"
    by_id = {item.id: item for item in found.items}
    assert set(by_id) == {"pattern-p1", "pattern-p2"}
    first, second = by_id["pattern-p1"], by_id["pattern-p2"]
    assert (first.title, first.lesson, first.tags) == ("Read the first error", "do", ("build", "ci"))
    assert first.origin == "imported"
    assert first.created_at_s == 1767323045.0
    assert first.contradicts == ("pattern-p2",)
    assert first.sources[0].trajectory_id == "task-task-1"
    assert (first.successes, first.failures) == (0.0, 0.0), "its confidence followed no outcome"
    assert second.lesson == "avoid"
    assert "bob@example.com" not in second.content
    (trajectory,) = found.trajectories
    assert trajectory.verdict is not None
    assert (trajectory.id, trajectory.verdict.outcome, trajectory.verdict.confidence) == (
        "task-task-1",
        "success",
        0.9,
    )
    assert trajectory.verdict.reasons == ("all green",)
    assert [(s.name, s.action, s.observation) for s in trajectory.steps] == [
        ("step", "run tests", "2 failed"),
        ("edit", "", ""),
    ]
    assert left_out(found) == {
        ("patterns", "whose pattern_data is no JSON object"): 1,
        ("patterns", "of type 'edit-style', which is no strategy"): 1,
        ("pattern_embeddings", "vectors of another embedder: texts are embedded anew"): 2,
        ("pattern_links", "'duplicate_of' links: consolidation finds its own"): 1,
        ("memory_entries", "key-value entries, no strategies"): 1,
    }


def test_agentdb_database(tmp_path: Path) -> None:
    """Catches hearsay that outweighs outcomes of our own, and tables that are skipped in silence."""
    found = read_memory_file(agentdb(tmp_path / "agentdb.db"), now_s=NOW_S)
    assert found.format == "agentdb"
    review, deploy = found.items
    assert review.content == "Look at the tests first"
    assert (review.successes, review.failures) == pytest.approx((4.0, 1.0))
    assert (deploy.title, deploy.tags, deploy.successes) == ("deploy", ("skill",), 0.0)
    (episode,) = found.trajectories
    assert episode.verdict is not None
    assert (episode.outcome, episode.verdict.outcome, episode.verdict.confidence) == (
        "failed",
        "failure",
        0.8,
    )
    assert episode.verdict.reasons == ("Should ask for a log",)
    assert left_out(found)["facts", "a table that memory has no place for"] == 1


def test_rows_numbered_alike_stay_apart(tmp_path: Path) -> None:
    """Catches ids made of row numbers alone: two databases would overwrite each other's first rows."""
    one = read_memory_file(agentdb(tmp_path / "one.db"), now_s=NOW_S)
    other_path = agentdb(tmp_path / "other.db")
    with closing(sqlite3.connect(other_path)) as database:
        database.execute("UPDATE reasoning_patterns SET approach = 'Something else'")
        database.commit()
    other = read_memory_file(other_path, now_s=NOW_S)
    assert one.items[0].id != other.items[0].id
    assert one.items[1].id == other.items[1].id
    assert one == read_memory_file(tmp_path / "one.db", now_s=NOW_S)


@pytest.mark.parametrize("compress", [False, True])
def test_agentdb_json_export(tmp_path: Path, compress: bool) -> None:
    """Catches an export that is taken for lines, and embeddings that are dropped without being counted."""
    rows: list[Any] = [
        {"id": 1, "ts": 1767000000, "session_id": "s", "task": "Fix it", "output": "done", "reward": 0.9,
         "success": 1, "embedding": {"0": 0.1}},
        {"id": 2, "ts": 1767000000, "session_id": "s", "task": "", "success": 1},
        "nonsense",
    ]  # fmt: skip
    content = json.dumps(rows, indent=2).encode()
    path = tmp_path / ("backup.json.gz" if compress else "backup.json")
    path.write_bytes(gzip.compress(content) if compress else content)
    found = read_memory_file(path, now_s=NOW_S)
    assert [trajectory.task for trajectory in found.trajectories] == ["Fix it"]
    assert left_out(found) == {
        ("embedding", "vectors of another embedder: texts are embedded anew"): 1,
        ("episodes", "without a task"): 1,
        ("list", "that are no objects"): 1,
    }


def test_a_file_with_a_log_beside_it(tmp_path: Path) -> None:
    """Catches rows lost because they are still in the write-ahead log of a program that runs."""
    path = tmp_path / "memory.db"
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.executescript(_REASONINGBANK)
        writer.execute(
            "INSERT INTO patterns (id, type, pattern_data) VALUES ('w', 'reasoning_memory', ?)",
            (pattern("W"),),
        )
        writer.commit()
        assert [item.id for item in read_memory_file(path, now_s=NOW_S).items] == ["pattern-w"]


def test_damaged_files_give_nothing(tmp_path: Path) -> None:
    """Catches a half-read database, and a complaint that does not name the file."""
    whole = reasoningbank(tmp_path / "memory.db").read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], whole[:100], _scrambled(whole))):
        path = tmp_path / f"damaged-{number}.db"
        path.write_bytes(content)
        with pytest.raises(DataCorrupted) as caught:
            read_memory_file(path, now_s=NOW_S)
        assert path.name in caught.value.message
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(b'[{"id": 1, "task": "a long enough text", "success": 1}]')[:-12])
    with pytest.raises(DataCorrupted):
        read_memory_file(cut, now_s=NOW_S)
    (tmp_path / "cut.json").write_text('[{"id": 1, "task": "x"')
    with pytest.raises(DataCorrupted):
        read_memory_file(tmp_path / "cut.json", now_s=NOW_S)


def _scrambled(content: bytes) -> bytes:
    page = 4096
    return content[:page] + bytes(b ^ 0x5A for b in content[page : 3 * page]) + content[3 * page :]


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Catches an import that calls a stranger's file empty instead of unknown."""
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE songs (id INTEGER)")
        database.commit()
    (tmp_path / "notes.txt").write_text("hello\n")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("other.db", "notes.txt", "empty"):
        with pytest.raises(InvalidInput) as caught:
            read_memory_file(tmp_path / name, now_s=NOW_S)
        assert caught.value.hint is not None
        assert ".swarm/memory.db" in caught.value.hint
    with pytest.raises(PathNotFound):
        read_memory_file(tmp_path / "absent.db", now_s=NOW_S)


_cells = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=60),
    st.binary(max_size=20),
    st.sampled_from(
        ["{}", "[]", '{"steps": [1, null, {"action": {"a": 1}}]}', '{"title": 1, "content": []}']
    ),
)
_columns = (
    "id", "type", "pattern_data", "created_at", "last_used", "task_id", "agent_id", "query",
    "trajectory_json",
    "started_at", "ended_at", "judge_label", "judge_conf", "judge_reasons", "ts", "task_type", "approach",
    "success_rate", "uses", "tags", "session_id", "task", "input", "output", "critique", "reward", "success",
    "name", "description", "signature", "code", "updated_at", "last_used_at",
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(_columns, _cells)))
def test_any_row_is_a_record_or_unusable(row: dict[str, Any]) -> None:
    """Catches a cell of an unexpected type that ends a whole import with a traceback."""
    for read in (
        lambda: pattern_item(row, {}, NOW_S),
        lambda: reasoning_item(row, NOW_S),
        lambda: skill_item(row, NOW_S),
        lambda: task_trajectory(row),
        lambda: episode_trajectory(row),
    ):
        try:
            record = read()
        except (Unusable, ValidationError):
            continue
        assert type(record).model_validate_json(record.model_dump_json()) == record


@given(st.one_of(_cells, st.datetimes().map(str)))
def test_moments_are_finite_and_past_the_epoch(value: Any) -> None:
    """Catches a time that no store can keep."""
    found = moment_s(value)
    assert found is None or 0 < found < 1e12
