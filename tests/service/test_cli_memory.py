"""`agentic-flow memory` as people meet it: every command, in this data folder and against a real server."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_process import Place

from agentic_flow.cli.main import main
from agentic_flow.client import AsyncClient
from agentic_flow.core.settings import load
from agentic_flow.memory.records import Trajectory, TrajectoryStep

Say = Callable[..., "Said"]


class Said:
    """What a command left."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def data(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@pytest.fixture(params=["embedded", "served"])
def say(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Say]:
    """Runs a command in this process, where it is no other than in one of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Said(code, out, err)

    if request.param == "embedded":
        monkeypatch.setenv("AGENTIC_FLOW_DATA_DIR", str(tmp_path / "data"))
        yield run
        return
    monkeypatch.setenv("AGENTIC_FLOW_DATA_DIR", str(tmp_path / "client"))
    with Place(tmp_path).start("serve", "all") as server:
        monkeypatch.setenv("AGENTIC_FLOW_PEERS__PLATFORM_URL", server.addresses()["platform"])
        yield run


def record(*trajectories: Trajectory) -> None:
    """Leave trajectories where the commands look, as a run would."""

    async def leave() -> None:
        async with AsyncClient(settings=load({}).settings) as client:
            for one in trajectories:
                await client.memory.record(one)

    asyncio.run(leave())


def rename(number: int, old: str, new: str, path: str, *, failed: bool = False) -> Trajectory:
    edit = {"path": path, "old": old, "new": new}
    return Trajectory(
        id=f"rename-{number}",
        task=f"rename the function {old} to {new} in the file {path}",
        outcome="failed" if failed else "completed",
        answer="" if failed else "renamed",
        error="the file is locked" if failed else None,
        steps=(
            TrajectoryStep(name="tool:file_search", action=json.dumps({"pattern": old}), observation=path),
            TrajectoryStep(
                name="tool:file_edit",
                action=json.dumps(edit),
                observation="" if failed else "1 change",
                error="locked" if failed else None,
            ),
        ),
    )


def test_items_from_writing_to_forgetting(say: Say) -> None:
    """Catches a command of items that fails, prints nothing, or says what it did not do."""
    assert say("memory", "items").out == "no items\n"
    assert say("memory", "recall", "run the linter").out.startswith("nothing that is kept fits")
    kept = say(
        "memory", "add", "Run the linter first", "--content", "Its messages name the file.",
        "--when", "Before a commit of changed files.", "--tag", "lint", "--json",
    ).data["id"]  # fmt: skip
    assert kept in say("memory", "items").out
    assert [one["id"] for one in say("memory", "items", "--state", "active", "--json").data["items"]] == [
        kept
    ]
    found = say("memory", "recall", "run the linter on changed files before a commit", "--explain")
    assert kept in found.out
    assert "similarity" in found.out
    context = say("memory", "recall", "run the linter on changed files before a commit", "--context")
    assert f"[{kept}]" in context.out
    assert "certified as recall-" in context.err
    assert "the chain is whole" in say("memory", "verify").out
    assert say("memory", "verify", "--json").data["certificates"] == 1
    assert "Its messages name the file." in say("memory", "show", kept).out
    assert "believed" in say("memory", "explain", kept).out
    assert say("memory", "explain", kept, "--json").data["item"]["tags"] == ["lint"]
    assert (
        say("memory", "edit", kept, "--content", "They name file and line.", "--json").data["revision"] == 2
    )
    assert "1 item in" in say("memory", "consolidate").out
    assert "0 recalls with an outcome" in say("memory", "uplift").out
    assert "1: 1 active" in say("memory", "status").out
    assert say("memory", "forget", kept).out == f"{kept} forgotten\n"
    again = say("memory", "forget", kept)
    assert again.code == 4
    assert repr(kept) in again.err


def test_runs_skills_and_episodes(say: Say, tmp_path: Path) -> None:
    """Catches a run that is not learned from, and a skill or episode that nobody can see, use or delete."""
    record(
        rename(1, "alpha", "beta", "src/a.py"),
        rename(2, "gamma", "delta", "lib/b.py"),
        rename(3, "omega", "sigma", "app/c.py"),
        rename(4, "kappa", "theta", "app/d.py", failed=True),
    )
    for number in (1, 2, 3):
        judged = say("memory", "verdict", f"rename-{number}", "success", "--reason", "read it", "--json").data
        assert judged["verdicts"][-1]["source"] == "person"
    assert "waits to be learned from" in say("memory", "verdict", "rename-4", "failure", "--by", "me").out
    learned = say("memory", "learn", "--json").data
    assert (learned["waiting"], learned["failed"]) == (0, 0)
    assert "rename-2" in say("memory", "trajectories", "--state", "learned").out
    listed = say("memory", "trajectories", "--outcome", "failed", "--since", "1d", "--json").data
    assert [one["id"] for one in listed["trajectories"]] == ["rename-4"]
    assert "verdict by person me, failure" in say("memory", "trajectory", "rename-4").out
    assert "rename-" in say("memory", "similar", "rename the function x to y in the file z", "-k", "2").out
    assert say("memory", "retry", "--json").data == {"ids": []}

    (skill,) = say("memory", "skills", "--json").data["skills"]
    assert skill["supported"] == 3
    assert skill["id"] in say("memory", "skills").out
    task = "rename the function one to two in the file three.py"
    (fitting,) = say("memory", "skills", "--for", task, "--json").data
    holes = fitting["parameters"]
    assert set(holes.values()) == {"one", "two", "three"}  # they all end in .py
    assert "one" in say("memory", "skills", "--for", task).out
    assert "file_search" in say("memory", "skill", skill["id"]).out
    values = [word for name, value in holes.items() for word in ("--set", f"{name}={value}")]
    steps = say("memory", "use", skill["id"], *values, "--json").data["steps"]
    assert steps[1]["arguments"] == {"path": "three.py", "old": "one", "new": "two"}
    assert "file_edit" in say("memory", "use", skill["id"], *values).out
    counted = say("memory", "used", skill["id"], "rename-3", "success", "--json").data
    assert counted["versions"][-1]["successes"] == 1
    why = say("memory", "explain", skill["id"], "--json").data
    assert [(one["trajectory_id"], one["kind"]) for one in why["evidence"]] == [
        ("rename-1", "taught"),
        ("rename-2", "taught"),
        ("rename-3", "use"),
    ]
    assert why["recalled"]
    assert "rename-3" in say("memory", "explain", skill["id"]).out
    assert say("memory", "forget", skill["id"], "--kind", "skill").code == 0
    assert say("memory", "skills", "--json").data["skills"] == []

    (episode,) = say("memory", "episodes", "--json").data["episodes"]
    assert episode["id"] == "rename-4"
    assert "rename-4" in say("memory", "episodes").out
    assert "what went wrong" in say("memory", "episode", "rename-4").out
    told = say("memory", "tries", "rename the function kappa to theta in the file app/e.py")
    assert "> [rename-4] Task: rename the function kappa" in told.out
    assert say("memory", "tries", "boil an egg", "--json").data["tries"] == []
    assert say("memory", "forget", "rename-4", "--kind", "episode").code == 0
    assert say("memory", "episodes").out.startswith("no episodes")

    picture = tmp_path / "memory.svg"
    assert say("memory", "plot", picture).code == 0
    assert b"<svg" in picture.read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("recall", "  "), 2, "the task is empty"),
        (("recall", "x", "-k", "0"), 2, "0"),
        (("recall", "x", "-k", "many"), 2, "many"),
        (("items", "--state", "odd"), 2, "odd"),
        (("items", "--limit", "1001"), 2, "1001"),
        (("trajectories", "--since", "yesterday-ish"), 2, "yesterday-ish"),
        (("verdict", "nobody", "success"), 4, "'nobody'"),
        (("verdict", "nobody", "splendid"), 2, "splendid"),
        (("verdict", "nobody", "success", "--confidence", "1.5"), 2, "1.5"),
        (("trajectory", "nobody"), 4, "'nobody'"),
        (("show", "nobody"), 4, "'nobody'"),
        (("edit", "nobody", "--title", "t"), 4, "'nobody'"),
        (("add", "", "--content", "c"), 2, "title"),
        (("skill", "nobody"), 4, "'nobody'"),
        (("use", "nobody", "--set", "novalue"), 2, "'novalue'"),
        (("used", "nobody", "run", "success"), 4, "'nobody'"),
        (("episode", "nobody"), 4, "'nobody'"),
        (("forget", "nobody", "--kind", "skill"), 4, "'nobody'"),
        (("tries", "x", "-k", "21"), 2, "21"),
        (("matts", "x", "--k", "17"), 2, "17"),
        (("import", "nowhere.db"), 2, "nowhere.db"),
        (("plot", "memory.bmp"), 2, "memory.bmp"),
        (("learn", "--timeout-s", "0"), 2, "0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    code: int,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches bad input that ends in a traceback, a vague line, or success."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AGENTIC_FLOW_DATA_DIR", str(tmp_path / "data"))
    assert main(["memory", *words]) == code
    out, err = capsys.readouterr()
    (problem,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in problem
    assert "hint: " in err
    assert out == ""


def reasoningbank(path: Path) -> Path:
    """A `.swarm/memory.db` as ports of ReasoningBank write it, with a row that is no pattern."""
    path.parent.mkdir(parents=True, exist_ok=True)
    good = {"title": "Read the error first", "description": "When a build fails.", "content": "It names it."}
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE patterns (id TEXT PRIMARY KEY, type TEXT NOT NULL, pattern_data TEXT NOT NULL,"
            " confidence REAL NOT NULL DEFAULT 0.5, usage_count INTEGER NOT NULL DEFAULT 0,"
            " created_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, last_used TEXT);"
        )
        rows = [("p1", json.dumps(good)), ("p2", "{not json")]
        connection.executemany(
            "INSERT INTO patterns (id, type, pattern_data) VALUES (?, 'reasoning_memory', ?)", rows
        )
        connection.commit()
    return path


def agentdb_export(path: Path) -> Path:
    """A JSON export of the npm package `agentdb`: an episode of today, one of long ago, and nonsense."""
    episode = {"id": 1, "ts": int(time.time()), "session_id": "s", "task": "fix the build", "success": 1}
    path.write_text(json.dumps([episode, {**episode, "id": 2, "ts": 1_600_000_000}, "nonsense"]), "utf-8")
    return path


def test_other_memories_are_taken_in(say: Say, tmp_path: Path) -> None:
    """Catches an import that takes nothing, takes all twice, or hides what it left out."""
    file = reasoningbank(tmp_path / ".swarm" / "memory.db")
    first = say("memory", "import", file)
    assert first.code == 0, first.err
    assert "a ReasoningBank database" in first.out
    assert "1 taken, 0 merged into others, 0 here already" in first.out
    assert "left out" in first.out
    again = say("memory", "import", file, "--json").data
    assert (again["items_added"], again["items_present"]) == (0, 1)
    assert again["left_out"][0]["count"] == 1
    assert "Read the error first" in say("memory", "items").out
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(file.read_bytes()[:600])
    refused = say("memory", "import", damaged)
    assert refused.code in (2, 9)
    assert "damaged.db" in refused.err
    assert len(say("memory", "items", "--json").data["items"]) == 1


def test_an_export_of_agentdb_is_taken_in(say: Say, tmp_path: Path) -> None:
    """Catches an export whose runs are lost, or learned from without being asked."""
    file = agentdb_export(tmp_path / "export.json")
    report = say("memory", "import", file, "--json").data
    assert (report["format"], report["trajectories_added"]) == ("agentdb-json", 1)
    assert sum(one["count"] for one in report["left_out"]) == 2
    assert say("memory", "learn", "--json").data["learned"] == 0
    (kept,) = say("memory", "trajectories", "--json").data["trajectories"]
    assert kept["task"] == "fix the build"
    assert say("memory", "import", file, "--learn", "--json").data["trajectories_present"] == 1


def test_our_own_export_is_taken_in_by_another_tenant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export of items that the import does not know, or that lands with its old owner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AGENTIC_FLOW_DATA_DIR", str(tmp_path / "data"))
    assert main(["memory", "add", "Ours", "--content", "only ours"]) == 0
    assert main(["db", "export", "memory.items", "items.jsonl"]) == 0
    assert main(["memory", "import", "items.jsonl", "--tenant", "team-b"]) == 0
    assert "1 taken, 0 merged into others, 0 here already" in capsys.readouterr().out
    assert main(["memory", "items", "--tenant", "team-b"]) == 0
    assert "Ours" in capsys.readouterr().out


def test_another_tenants_memory_is_another_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches items of one tenant in the answers of another, and a tenant that can be chosen over HTTP."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AGENTIC_FLOW_DATA_DIR", str(tmp_path / "data"))
    assert main(["memory", "add", "Ours", "--content", "only ours", "--tenant", "team-a"]) == 0
    capsys.readouterr()
    assert main(["memory", "items", "--tenant", "team-b"]) == 0
    assert capsys.readouterr().out == "no items\n"
    monkeypatch.setenv("AGENTIC_FLOW_PEERS__PLATFORM_URL", "http://127.0.0.1:9")
    assert main(["memory", "items", "--tenant", "team-a"]) == 2
    assert "'team-a' cannot be chosen" in capsys.readouterr().err
