"""file_search on real files, with its real child process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.ports import ToolResult, ToolScope
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.tools.audit import AuditLog
from agentic_flow.tools.files import file_tools
from agentic_flow.tools.policy import Policy
from agentic_flow.tools.text import lines_of
from agentic_flow.tools.toolbox import StandardToolBox


def regex_workers() -> list[psutil.Process]:
    """The children that match; what ends while it is looked at is none."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "regex_worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


class Bench:
    def __init__(self, root: Path, audit: AuditLog) -> None:
        self.root = root
        self.audit = audit

    def box(self, **limits: Any) -> StandardToolBox:
        return StandardToolBox(
            file_tools(), settings=ToolsSettings(**limits), policy=Policy(), audit=self.audit
        )

    def call(self, *, deadline_s: float = 20, max_bytes: int = 65536, **arguments: Any) -> ToolResult:
        return asyncio.run(
            self.box(result_max_bytes=max_bytes).call(
                LOCAL_OWNER,
                "file_search",
                arguments,
                deadline=Deadline.after(deadline_s),
                scope=ToolScope(roots={"r": self.root}),
            )
        )

    def lines(self, **arguments: Any) -> list[str]:
        result = self.call(**arguments)
        assert not result.is_error, result.content
        return [f"{m['path']}:{m['line']}" for m in result.content["matches"]]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    root = tmp_path / "r"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_text("alpha\nBeta beta\nfoo.bar\nfooXbar\nbetamax\n")
    (root / "sub" / "b.py").write_text("x = 1\n\n\nbeta = 2  # last\n")
    audit = AuditLog(tmp_path / "audit.db")
    yield Bench(root, audit)
    audit.close()


def test_options_select_lines(bench: Bench) -> None:
    """Catches an option that is accepted and ignored, and wrong line numbers."""
    assert bench.lines(pattern="beta") == ["a.txt:2", "a.txt:5", "sub/b.py:4"]
    assert bench.lines(pattern="beta", word=True) == ["a.txt:2", "sub/b.py:4"]
    assert bench.lines(pattern="BETA") == []
    assert len(bench.lines(pattern="BETA", case="insensitive")) == 3
    assert bench.lines(pattern="Beta", case="smart") == ["a.txt:2"]
    assert len(bench.lines(pattern="beta", case="smart")) == 3
    assert bench.lines(pattern="o.b") == ["a.txt:3", "a.txt:4"]
    assert bench.lines(pattern="o.b", literal=True) == ["a.txt:3"]
    assert bench.lines(pattern="^beta") == ["a.txt:5", "sub/b.py:4"]
    assert bench.lines(pattern="beta", glob="*.py") == ["sub/b.py:4"]
    assert bench.lines(pattern="beta", path="sub") == ["sub/b.py:4"]
    assert bench.lines(pattern="beta", path="a.txt") == ["a.txt:2", "a.txt:5"]


def test_context_modes_and_counts(bench: Bench) -> None:
    """Catches context from the wrong side, and files counted twice."""
    match = bench.call(pattern="foo\\.", context=1).content["matches"][0]
    assert (match["before"], match["text"], match["after"]) == (["Beta beta"], "foo.bar", ["fooXbar"])
    files = bench.call(pattern="beta", mode="files").content
    assert files["files"] == [{"path": "a.txt"}, {"path": "sub/b.py"}]
    counts = bench.call(pattern="beta", mode="count").content["files"]
    assert counts == [{"path": "a.txt", "count": 2}, {"path": "sub/b.py", "count": 1}]


@pytest.mark.parametrize("mode", ["lines", "files"])
def test_pages_by_cursor_are_the_whole(bench: Bench, mode: str) -> None:
    """Catches matches lost or repeated between pages, within a file, across files and at the byte limit."""
    for n in range(6):
        (bench.root / f"f{n}.txt").write_text("hit\nno\nhit\n" * 3)
    key = "matches" if mode == "lines" else "files"
    whole = bench.call(pattern="hit", mode=mode, limit=500).content[key]
    for limit, max_bytes in ((1, 65536), (4, 65536), (500, 1200)):
        seen: list[Any] = []
        cursor: dict[str, str] = {}
        while True:
            page = bench.call(pattern="hit", mode=mode, limit=limit, max_bytes=max_bytes, **cursor)
            assert not page.is_error
            assert len(page.content[key]) <= limit
            seen += page.content[key]
            if not page.truncated:
                break
            cursor = {"cursor": page.content["cursor"]}
        assert seen == whole


def test_bad_pattern_is_explained(bench: Bench) -> None:
    """Catches a pattern error that becomes a crash or an empty result."""
    result = bench.call(pattern="(unclosed")
    assert result.is_error
    assert "(unclosed" in result.content["message"]
    assert "literal=true" in result.content["hint"]


def test_catastrophic_pattern_is_stopped_and_leaves_no_process(bench: Bench) -> None:
    """Catches a backtracking pattern that hangs the server: the loop keeps turning and the child is gone."""
    (bench.root / "evil.txt").write_text("a" * 40 + "!\n")
    turns = 0

    async def run(limit_s: float) -> ToolResult:
        nonlocal turns
        call = asyncio.ensure_future(
            bench.box().call(
                LOCAL_OWNER,
                "file_search",
                {"pattern": "^(a+)+$", "path": "evil.txt"},
                deadline=Deadline.after(limit_s),
                scope=ToolScope(roots={"r": bench.root}),
            )
        )
        while not call.done():
            turns += 1
            await asyncio.wait([call], timeout=0.05)
        return call.result()

    for limit_s in (3, 20):  # a busy machine may take longer than the first to start the child
        result = asyncio.run(run(limit_s))
        if "evil.txt" in str(result.content):
            break
    assert result.is_error
    assert result.content["code"] == "deadline_exceeded"
    assert "evil.txt" in result.content["message"]
    assert turns > 5
    assert not regex_workers()


def test_cancelled_search_kills_its_child(bench: Bench) -> None:
    """Catches a child that burns on after its caller has gone."""
    (bench.root / "evil.txt").write_text("a" * 40 + "!\n")
    children: list[psutil.Process] = []

    async def run() -> None:
        call = asyncio.ensure_future(
            bench.box().call(
                LOCAL_OWNER,
                "file_search",
                {"pattern": "^(a+)+$"},
                deadline=Deadline.after(20),
                scope=ToolScope(roots={"r": bench.root}),
            )
        )
        while not children:
            await asyncio.sleep(0.01)
            children.extend(regex_workers())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(run())
    assert not psutil.wait_procs(children, timeout=30)[1]


def test_memory_hungry_pattern_fails_alone(bench: Bench) -> None:
    """Catches a pattern whose compiled form eats the machine's memory."""
    result = bench.call(pattern="((((a{1,900}){1,900}){1,900}){1,900}){1,900}b", deadline_s=5)
    assert result.is_error or result.content["matches"] == []
    assert bench.lines(pattern="alpha") == ["a.txt:1"]


def test_long_lines_are_clipped_around_the_match(bench: Bench) -> None:
    """Catches a minified file that floods the result, or a clip that loses the match."""
    (bench.root / "min.js").write_text("x" * 100_000 + "TARGET" + "y" * 100_000)
    [match] = bench.call(pattern="TARGET", path="min.js").content["matches"]
    assert "TARGET" in match["text"]
    assert len(match["text"]) < 500


def test_large_tree_costs_no_more_than_it_must(bench: Bench) -> None:
    """Catches a search that starts a process per file: 300 files, one child, all searched."""
    for n in range(300):
        (bench.root / f"n{n:03}.txt").write_text(f"word{n}\n" * 50)
    before = time.process_time()
    result = bench.call(pattern=r"word299$", mode="files").content
    assert result["files"] == [{"path": "n299.txt"}]
    assert result["files_searched"] == 302
    assert time.process_time() - before < 20  # far above what it takes; a hang, not a figure


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.sampled_from("aé\n\r\x0b\x0c\x1c\x85\u2028\t \U0001f600"), max_size=40))
def test_line_numbers_agree_with_file_read(bench: Bench, text: str) -> None:
    """Catches two ideas of what a line is: a search hit must be the line that file_read shows."""
    (bench.root / "odd.txt").write_bytes(text.encode())
    lines = lines_of(text)
    wanted = [f"odd.txt:{n}" for n, line in enumerate(lines, start=1) if "a" in line]
    assert bench.lines(pattern="a", path="odd.txt") == wanted
    assert os.path.getsize(bench.root / "odd.txt") == len(text.encode())
