"""File tools through the real ToolBox on real folders."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, Forbidden, InvalidInput, PathNotFound, TooLarge
from agentic_flow.core.ports import ToolResult, ToolScope
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.tools.audit import AuditLog
from agentic_flow.tools.confine import Confinement, confined_read
from agentic_flow.tools.files import file_tools
from agentic_flow.tools.policy import Defaults, Policy
from agentic_flow.tools.toolbox import StandardToolBox

ALLOW_ALL = Policy(defaults=Defaults(read="allow", write="allow", destructive="allow"))


class Bench:
    """A ToolBox with the file tools over one folder."""

    def __init__(self, root: Path, audit: AuditLog) -> None:
        self.root = root
        self.audit = audit
        self.scope = ToolScope(roots={"proj": root})

    def call(
        self, name: str, scope: ToolScope | None = None, max_bytes: int = 65536, **arguments: Any
    ) -> ToolResult:
        box = StandardToolBox(
            file_tools(),
            settings=ToolsSettings(result_max_bytes=max_bytes),
            policy=ALLOW_ALL,
            audit=self.audit,
        )
        return asyncio.run(
            box.call(LOCAL_OWNER, name, arguments, deadline=Deadline.after(20), scope=scope or self.scope)
        )

    def ok(self, name: str, **arguments: Any) -> dict[str, Any]:
        result = self.call(name, **arguments)
        assert not result.is_error, result.content
        return result.content

    def error(self, name: str, **arguments: Any) -> dict[str, Any]:
        result = self.call(name, **arguments)
        assert result.is_error, result.content
        return result.content


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    root = tmp_path / "proj"
    (root / "src" / "deep").mkdir(parents=True)
    (root / "secret").mkdir()
    (root / "a.py").write_text("".join(f"line {n}\n" for n in range(1, 11)))
    (root / "src" / "b.py").write_text("def b():\n    return needle\n")
    (root / "src" / "deep" / "c.md").write_text("# needle\n")
    (root / "secret" / "key.txt").write_text("needle in secret\n")
    (root / ".gitignore").write_text("build/\n*.log\n!keep.log\n")
    (root / "build").mkdir()
    (root / "build" / "out.py").write_text("needle\n")
    (root / "x.log").write_text("needle\n")
    (root / "keep.log").write_text("needle\n")
    (root / ".hidden").write_text("needle\n")
    (root / "bin.dat").write_bytes(b"needle\0\1\2")
    audit = AuditLog(tmp_path / "audit.db")
    yield Bench(root, audit)
    audit.close()


def paths(content: dict[str, Any], key: str = "entries") -> list[str]:
    return [entry["path"] for entry in content[key]]


# ---- reading ---------------------------------------------------------------------------------------------


def test_read_range_hash_and_total(bench: Bench) -> None:
    """Catches off-by-one line ranges and a hash of anything but the file's bytes."""
    got = bench.ok("file_read", path="a.py", line_start=3, line_end=5)
    assert (got["text"], got["line_start"], got["line_end"], got["lines_total"]) == (
        "line 3\nline 4\nline 5",
        3,
        5,
        10,
    )
    assert got["sha256"] == hashlib.sha256((bench.root / "a.py").read_bytes()).hexdigest()
    assert got["truncated"] is False
    numbered = bench.ok("file_read", path="a.py", line_start=10, numbered=True)
    assert numbered["text"].split("\t") == ["    10", "line 10"]


def test_read_pages_rejoin_to_the_whole_file(bench: Bench) -> None:
    """Catches lines lost or repeated at a page border, and pages that the ToolBox has to cut again."""
    lines = [f"{n}: " + "é\t" * 40 for n in range(400)]
    (bench.root / "big.txt").write_text("\n".join(lines))
    seen: list[str] = []
    start = 1
    while True:
        result = bench.call("file_read", path="big.txt", line_start=start, max_bytes=8192)
        seen += result.content["text"].split("\n")
        assert result.content["line_end"] == len(seen)
        if not result.truncated:
            break
        start = result.content["line_end"] + 1
    assert seen == lines


def test_read_refuses_what_is_no_text(bench: Bench) -> None:
    """Catches binary bytes sent to a model, and errors that leave the reader without a way on."""
    binary = bench.error("file_read", path="bin.dat")
    assert "binary" in binary["message"]
    assert "9 bytes" in binary["message"]
    assert "folder" in bench.error("file_read", path="src")["message"]
    assert bench.error("file_read", path="none.py")["code"] == "path_not_found"
    assert "past the end" in bench.error("file_read", path="a.py", line_start=99)["message"]
    (bench.root / "empty").write_text("")
    assert bench.ok("file_read", path="empty")["lines_total"] == 0


def test_read_special_files_neither_hangs_nor_reads(bench: Bench) -> None:
    """Catches an open() that waits for a FIFO's writer, or a device or socket read as a file."""
    os.mkfifo(bench.root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(bench.root)  # a socket's path must be short
        try:
            server.bind("sock")
        finally:
            os.chdir(here)
        for name, kind in (("pipe", "fifo"), ("sock", "socket")):
            error = bench.error("file_read", path=name)
            assert error["code"] == "forbidden"
            assert kind in error["message"]
    if os.geteuid() == 0:
        os.mknod(bench.root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        assert "device" in bench.error("file_read", path="null")["message"]
    found = {entry["path"]: entry["kind"] for entry in bench.ok("file_list")["entries"]}
    assert (found["pipe"], found["sock"]) == ("fifo", "socket")
    assert bench.ok("file_search", pattern="needle")["files_searched"] > 0


# ---- confinement -----------------------------------------------------------------------------------------


def test_links_and_climbing_are_refused_everywhere(bench: Bench, tmp_path: Path) -> None:
    """Catches any file tool that follows a link or '..' out of the root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "loot.txt").write_text("needle loot\n")
    (bench.root / "link.txt").symlink_to(outside / "loot.txt")
    (bench.root / "linkdir").symlink_to(outside)
    (bench.root / "inner.txt").symlink_to("a.py")
    bad = ["link.txt", "linkdir/loot.txt", "inner.txt", "../outside/loot.txt", str(outside / "loot.txt"),
           "src/../../outside/loot.txt", "a.py\0.txt"]  # fmt: skip
    for path in bad:
        for tool, extra in (
            ("file_read", {}),
            ("file_write", {"text": "x"}),
            ("file_edit", {"old_text": "needle", "new_text": "x"}),
            ("file_search", {"pattern": "needle"}),
        ):
            error = bench.error(tool, path=path, **extra)
            assert error["code"] in ("forbidden", "invalid_input"), (tool, path, error)
    for tool in ("file_list", "file_find"):
        for path in ("linkdir", "..", "/"):
            assert bench.call(tool, path=path).is_error
    assert (outside / "loot.txt").read_text() == "needle loot\n"
    assert "linkdir/loot.txt" not in str(bench.ok("file_search", pattern="loot"))
    assert bench.ok("file_info", path="link.txt")["kind"] == "symlink"
    assert bench.ok("file_info", path="link.txt")["sha256"] is None


def test_swapping_a_folder_for_a_link_never_leaks(bench: Bench, tmp_path: Path) -> None:
    """Catches a check-then-open race: a thread swaps a folder and a link to the outside all the time."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f.txt").write_text("LOOT")
    swapped, aside = bench.root / "swap", bench.root / "aside"
    swapped.mkdir()
    (swapped / "f.txt").write_text("mine")
    link = bench.root / "link"
    link.symlink_to(outside)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            os.rename(swapped, aside)
            os.rename(link, swapped)
            os.rename(swapped, link)
            os.rename(aside, swapped)

    thread = threading.Thread(target=swap)
    thread.start()
    seen: set[str] = set()
    tries = 0
    try:
        confinement = Confinement(bench.scope)
        while tries < 3000 or (seen < {"read", "refused"} and tries < 200_000):
            tries += 1
            try:
                assert confined_read(bench.scope, "swap/f.txt", max_bytes=100) == b"mine"
                seen.add("read")
            except AgenticFlowError:
                seen.add("refused")
            try:
                with confinement.open_parent(confinement.locate("swap/f.txt")) as (parent, name):
                    written = os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=parent)
                os.close(written)
            except (AgenticFlowError, FileNotFoundError):
                continue
    finally:
        done.set()
        thread.join()
    assert seen == {"read", "refused"}  # else the race was never run
    assert (outside / "f.txt").read_text() == "LOOT"


def test_swapped_target_of_a_write_stays_outside(bench: Bench, tmp_path: Path) -> None:
    """Catches a write that goes through a link placed at its target at the last moment."""
    victim = tmp_path / "victim.txt"
    victim.write_text("LOOT")
    target = bench.root / "t.txt"
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            spare = bench.root / "spare"
            spare.symlink_to(victim)
            os.replace(spare, target)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(40):
            bench.call("file_write", path="t.txt", text="mine")
    finally:
        done.set()
        thread.join()
    assert victim.read_text() == "LOOT"


def test_forbidden_files_do_not_exist_for_tools(bench: Bench) -> None:
    """Catches a forbidden file that shows in a listing, a find, a search, or by a differing answer."""
    scope = ToolScope(roots={"proj": bench.root}, paths_forbidden=("secret/", "*.dat"))
    everything = {"hidden": True, "ignored": True}
    listed = bench.ok("file_list", scope=scope, depth=9, **everything)
    found = bench.ok("file_find", scope=scope, kind="any", **everything)
    searched = bench.ok("file_search", scope=scope, pattern="needle", **everything)
    for content in (listed, found, searched):
        assert "secret" not in str(content)
        assert "bin.dat" not in str(content)
    for tool, extra in (
        ("file_read", {}),
        ("file_info", {}),
        ("file_write", {"text": "x"}),
        ("file_edit", {"old_text": "a", "new_text": "b"}),
        ("file_search", {"pattern": "x"}),
    ):
        there = bench.error(tool, scope=scope, path="secret/key.txt", **extra)
        absent = bench.error(tool, scope=scope, path="secret/none.txt", **extra)
        assert there["code"] == absent["code"] == "forbidden"
        assert there["message"].replace("key", "none") == absent["message"]
    for path in ("./secret//key.txt", "secret/./key.txt"):
        assert bench.error("file_read", scope=scope, path=path)["code"] == "forbidden"
    assert bench.call("file_list", scope=scope, path="secret").is_error
    assert bench.call("file_write", scope=scope, path="new.dat", text="x").is_error
    assert (bench.root / "secret" / "key.txt").read_text() == "needle in secret\n"


def test_allowed_paths_bound_every_tool(bench: Bench) -> None:
    """Catches an allow-list that only some tools obey, or that hides the folders on the way."""
    scope = ToolScope(roots={"proj": bench.root}, paths_allowed=("src/deep/**",))
    assert paths(bench.ok("file_list", scope=scope, depth=9)) == ["src", "src/deep", "src/deep/c.md"]
    assert paths(bench.ok("file_search", scope=scope, pattern="needle"), "matches") == ["src/deep/c.md"]
    assert bench.error("file_read", scope=scope, path="a.py")["code"] == "forbidden"
    assert bench.ok("file_read", scope=scope, path="src/deep/c.md")["text"] == "# needle"
    assert bench.call("file_write", scope=scope, path="src/b.py", text="").is_error
    with pytest.raises(Forbidden):
        confined_read(scope, "a.py", max_bytes=10)


def test_several_roots_need_their_names(bench: Bench, tmp_path: Path) -> None:
    """Catches roots that are mixed up, and patterns held against the wrong form of a path."""
    other = tmp_path / "other"
    (other / "src").mkdir(parents=True)
    (other / "src" / "d.py").write_text("needle\n")
    roots = {"proj": bench.root, "other": other}
    scope = ToolScope(roots=roots)
    assert bench.ok("file_read", scope=scope, path="other/src/d.py")["text"] == "needle"
    assert "root" in bench.error("file_read", scope=scope, path="src/d.py")["message"]
    assert paths(bench.ok("file_find", scope=scope, glob="src/*.py")) == []
    assert paths(bench.ok("file_find", scope=scope, glob="*.py")) == [
        "other/src/d.py", "proj/a.py", "proj/src/b.py",
    ]  # fmt: skip
    only = ToolScope(roots=roots, paths_allowed=("/other/**",))
    assert paths(bench.ok("file_find", scope=only)) == ["other/src/d.py"]
    without = ToolScope(roots=roots, paths_forbidden=("src/",))
    assert "src" not in str(bench.ok("file_find", scope=without))


def test_no_roots_no_files(bench: Bench) -> None:
    """Catches a scope without roots that falls back to the working folder."""
    assert bench.error("file_list", scope=ToolScope())["code"] == "forbidden"


def test_confined_read_limits(bench: Bench) -> None:
    """Catches a reviewer's read that ignores its size limit or hides what went wrong."""
    assert confined_read(bench.scope, "src/b.py", max_bytes=1000).startswith(b"def b")
    with pytest.raises(TooLarge):
        confined_read(bench.scope, "a.py", max_bytes=3)
    with pytest.raises(PathNotFound):
        confined_read(bench.scope, "zzz", max_bytes=3)
    with pytest.raises(InvalidInput):
        confined_read(bench.scope, "", max_bytes=3)


def test_no_descriptor_leaks(bench: Bench) -> None:
    """Catches a descriptor left open by a success, a refusal or an abandoned walk."""
    (bench.root / "l").symlink_to("/")

    def work() -> None:
        bench.call("file_read", path="a.py")
        bench.call("file_read", path="l/etc/passwd")
        bench.call("file_read", path="src/none")
        bench.call("file_list", depth=9, limit=1)
        bench.call("file_search", pattern="needle", limit=1)
        bench.call("file_write", path="src/n.txt", text="x")

    work()  # threads and database readers of the first round stay
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        work()
    assert len(os.listdir("/proc/self/fd")) <= before


# ---- listing and finding ---------------------------------------------------------------------------------


def test_list_obeys_ignore_files_and_depth(bench: Bench) -> None:
    """Catches ignored or hidden entries in a listing, and a depth that is one off."""
    assert paths(bench.ok("file_list")) == ["a.py", "bin.dat", "keep.log", "secret", "src"]
    assert "src/deep/c.md" not in paths(bench.ok("file_list", depth=2))
    assert "src/deep/c.md" in paths(bench.ok("file_list", depth=3))
    assert "build/out.py" in paths(bench.ok("file_list", depth=2, ignored=True))
    assert ".hidden" in paths(bench.ok("file_list", hidden=True))
    (bench.root / "src" / ".gitignore").write_text("b.py\n")
    assert "src/b.py" not in paths(bench.ok("file_list", path="src"))
    assert paths(bench.ok("file_list", path="src/deep")) == ["src/deep/c.md"]


def test_pages_by_cursor_are_the_whole(bench: Bench) -> None:
    """Catches entries skipped or repeated between pages, also across folders."""
    for tool in ("file_list", "file_find"):
        arguments = {"depth": 9} if tool == "file_list" else {"kind": "any"}
        whole = paths(bench.ok(tool, **arguments))
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            page = bench.ok(tool, limit=2, **arguments, **cursor)
            seen += paths(page)
            if not page["truncated"]:
                break
            cursor = {"cursor": page["cursor"]}
        assert seen == whole == sorted(whole, key=lambda path: path.split("/"))


def test_find_by_name_size_and_age(bench: Bench) -> None:
    """Catches a filter that is ignored or turned around."""
    os.utime(bench.root / "a.py", (1000, 1000))
    assert paths(bench.ok("file_find", glob="*.{py,md}")) == ["a.py", "src/b.py", "src/deep/c.md"]
    assert paths(bench.ok("file_find", glob="deep/*.md", path="src")) == ["src/deep/c.md"]
    assert paths(bench.ok("file_find", modified_before_s=2000)) == ["a.py"]
    assert "a.py" not in paths(bench.ok("file_find", modified_after_s=2000))
    assert paths(bench.ok("file_find", size_min_bytes=50)) == ["a.py"]
    assert paths(bench.ok("file_find", size_max_bytes=9)) == ["bin.dat", "keep.log", "src/deep/c.md"]
    assert paths(bench.ok("file_find", kind="folder")) == ["secret", "src", "src/deep"]


def test_info(bench: Bench) -> None:
    """Catches wrong sizes, modes or hashes."""
    os.chmod(bench.root / "a.py", 0o640)
    info = bench.ok("file_info", path="a.py")
    data = (bench.root / "a.py").read_bytes()
    assert (info["kind"], info["size_bytes"], info["mode"]) == ("file", len(data), "0640")
    assert info["sha256"] == hashlib.sha256(data).hexdigest()
    assert bench.ok("file_info", path="src")["kind"] == "folder"


# ---- writing ---------------------------------------------------------------------------------------------


def test_write_creates_and_replaces(bench: Bench) -> None:
    """Catches a write without effect, a lost mode, or temporary files left behind."""
    made = bench.ok("file_write", path="new/deep/n.txt", text="héllo\n", create_folders=True)
    assert made["created"] is True
    assert (bench.root / "new/deep/n.txt").read_text() == "héllo\n"
    assert made["sha256"] == hashlib.sha256("héllo\n".encode()).hexdigest()
    os.chmod(bench.root / "a.py", 0o750)
    replaced = bench.ok("file_write", path="a.py", text="x")
    assert (replaced["created"], (bench.root / "a.py").read_text()) == (False, "x")
    assert stat.S_IMODE((bench.root / "a.py").stat().st_mode) == 0o750
    assert bench.error("file_write", path="no/where.txt", text="")["hint"].startswith("set create_folders")
    assert "folder" in bench.error("file_write", path="src", text="")["message"]
    assert not [name for name in os.listdir(bench.root) if name.endswith(".tmp")]


def test_dry_run_changes_nothing(bench: Bench) -> None:
    """Catches a dry run that writes."""
    before = {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()}
    assert bench.ok("file_write", path="q/n.txt", text="x", create_folders=True, dry_run=True)["created"]
    bench.ok("file_write", path="a.py", text="x", dry_run=True)
    edit = bench.ok("file_edit", path="a.py", old_text="line 2\n", new_text="two\n", dry_run=True)
    assert "-line 2\n+two\n" in edit["diff"]
    assert {p: p.read_bytes() for p in bench.root.rglob("*") if p.is_file()} == before
    assert not (bench.root / "q").exists()


def test_expected_hash_guards_writes(bench: Bench) -> None:
    """Catches a lost update: the file changed since it was read, and is overwritten anyway."""
    sha = bench.ok("file_read", path="a.py")["sha256"]
    (bench.root / "a.py").write_text("somebody else\n")
    for tool, extra in (
        ("file_write", {"text": "mine"}),
        ("file_edit", {"old_text": "else", "new_text": "x"}),
    ):
        assert bench.error(tool, path="a.py", expected_sha256=sha, **extra)["code"] == "conflict"
    assert bench.error("file_write", path="a.py", text="", expected_sha256="absent")["code"] == "conflict"
    assert (bench.root / "a.py").read_text() == "somebody else\n"
    assert bench.ok("file_write", path="b.new", text="1", expected_sha256="absent")["created"]


def test_concurrent_writers_with_one_hash_have_one_winner(bench: Bench) -> None:
    """Catches check and replace that are two steps: of eight writers that saw one version, one may win."""
    sha = bench.ok("file_info", path="a.py")["sha256"]
    box = StandardToolBox(file_tools(), settings=ToolsSettings(), policy=ALLOW_ALL, audit=bench.audit)

    async def race() -> list[ToolResult]:
        return await asyncio.gather(
            *(
                box.call(
                    LOCAL_OWNER,
                    "file_write",
                    {"path": "a.py", "text": f"writer {n}", "expected_sha256": sha},
                    deadline=Deadline.after(20),
                    scope=bench.scope,
                )
                for n in range(8)
            )
        )

    results = asyncio.run(race())
    winners = [result for result in results if not result.is_error]
    assert len(winners) == 1
    text = (bench.root / "a.py").read_bytes()
    assert winners[0].content["sha256"] == hashlib.sha256(text).hexdigest()
    assert {result.content["code"] for result in results if result.is_error} == {"conflict"}


def test_edit_needs_a_unique_exact_text(bench: Bench) -> None:
    """Catches an edit at the wrong place: ambiguous, absent or equal texts must change nothing."""
    before = (bench.root / "a.py").read_bytes()
    assert "10 times" in bench.error("file_edit", path="a.py", old_text="line", new_text="x")["message"]
    assert "not occur" in bench.error("file_edit", path="a.py", old_text="nope", new_text="x")["message"]
    assert bench.call("file_edit", path="a.py", old_text="line 2", new_text="line 2").is_error
    assert bench.call("file_edit", path="bin.dat", old_text="needle", new_text="x").is_error
    assert (bench.root / "a.py").read_bytes() == before
    done = bench.ok("file_edit", path="a.py", old_text="line", new_text="row", replace_all=True)
    assert done["replaced"] == 10
    assert (bench.root / "a.py").read_text().startswith("row 1\nrow 2\n")


def test_edit_keeps_crlf_and_bom(bench: Bench) -> None:
    """Catches an edit that rewrites every line end or drops the byte order mark."""
    (bench.root / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nthree\r\n")
    bench.ok("file_edit", path="w.txt", old_text="one\ntwo", new_text="1\n2")
    assert (bench.root / "w.txt").read_bytes() == b"\xef\xbb\xbf1\r\n2\r\nthree\r\n"


def test_diff_names_the_real_lines(bench: Bench) -> None:
    """Catches hunk headers that count from the shortened comparison instead of the file."""
    (bench.root / "long.txt").write_text("".join(f"{n}\n" for n in range(1, 101)))
    edit = bench.ok("file_edit", path="long.txt", old_text="50\n", new_text="fifty\nand a half\n")
    assert edit["diff"].splitlines()[2] == "@@ -47,7 +47,8 @@"
