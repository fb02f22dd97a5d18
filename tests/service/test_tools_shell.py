"""shell_run with real programs, and what is left of them afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentic_flow.core.auth import LOCAL_OWNER
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Forbidden, NotFound
from agentic_flow.core.ports import ToolResult, ToolScope
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.tools.audit import AuditLog
from agentic_flow.tools.policy import Defaults, Policy
from agentic_flow.tools.shell import ShellLimits, resolve_program, shell_tools
from agentic_flow.tools.toolbox import StandardToolBox

PYTHON = "python3"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


class Bench:
    def __init__(self, root: Path, audit: AuditLog) -> None:
        self.root = root
        self.audit = audit

    def box(self, limits: ShellLimits | None = None, **settings: Any) -> StandardToolBox:
        chosen = ToolsSettings(shell_allowed=(PYTHON, "sh", "echo", "no-such-program"), **settings)
        return StandardToolBox(
            shell_tools(chosen, limits=limits),
            settings=chosen,
            policy=Policy(defaults=Defaults(destructive="allow")),
            audit=self.audit,
        )

    def run(
        self,
        *argv: str,
        limits: ShellLimits | None = None,
        scope: ToolScope | None = None,
        deadline_s: float = 20,
        settings: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> ToolResult:
        return asyncio.run(
            self.box(limits, **(settings or {})).call(
                LOCAL_OWNER,
                "shell_run",
                {"argv": list(argv), **arguments},
                deadline=Deadline.after(deadline_s),
                scope=scope or ToolScope(roots={"r": self.root}),
            )
        )

    def python(self, code: str, **options: Any) -> dict[str, Any]:
        result = self.run(PYTHON, "-c", code, **options)
        assert not result.is_error, result.content
        return result.content


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    # The interpreter itself, not a version manager's shim, which would add variables and processes.
    real = os.path.dirname(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", f"{real}:{os.environ['PATH']}")
    root = tmp_path / "r"
    (root / "sub").mkdir(parents=True)
    audit = AuditLog(tmp_path / "audit.db")
    yield Bench(root, audit)
    audit.close()


def survivors(mark: str) -> list[psutil.Process]:
    """Processes whose command line holds a text, zombies aside."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_output_and_exit_code_are_the_programs(bench: Bench) -> None:
    """Catches lost output, swapped streams, and an exit code that is made up."""
    got = bench.python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    assert (got["exit_code"], got["signal"], got["stdout"], got["stderr"]) == (3, None, "out\n", "err\n")
    assert got["timed_out"] is False
    killed = bench.python("import os; os.kill(os.getpid(), 11)")
    assert (killed["exit_code"], killed["signal"]) == (None, "SIGSEGV")


def test_words_are_never_a_shell(bench: Bench) -> None:
    """Catches arguments that a shell would expand or run."""
    words = ["$HOME", "`id`", "; touch pwned", "*", "a  b", ""]
    assert bench.run("echo", *words).content["stdout"] == " ".join(words) + "\n"
    assert not (bench.root / "pwned").exists()


def test_environment_is_clean(bench: Bench) -> None:
    """Catches keys of this process in the child's environment, open stdin, and inherited descriptors."""
    os.environ["A_SECRET_OF_OURS"] = "hunter2"
    try:
        got = bench.python(
            "import json, os, sys; fds = sorted(int(f) for f in os.listdir('/proc/self/fd'));"
            "print(json.dumps([dict(os.environ), sys.stdin.read(), len(fds), os.getcwd()]))"
        )
    finally:
        del os.environ["A_SECRET_OF_OURS"]
    environment, stdin, descriptors, folder = json.loads(got["stdout"])
    assert set(environment) <= {"PATH", "LANG", "HOME", "TMPDIR", "LC_CTYPE"}
    assert "hunter2" not in str(environment)
    assert stdin == ""
    assert descriptors <= 4  # 0, 1, 2 and the listing itself
    assert folder == str(bench.root)
    assert not os.path.exists(environment["HOME"])


def test_only_allowed_programs_run(bench: Bench) -> None:
    """Catches a program by path, off the list, or not installed, reported as anything else."""
    for argv in (["ls"], ["/bin/echo"], ["./echo"], ["sub/../echo"], ["ECHO"], [""]):
        assert bench.run(*argv).content["code"] == "forbidden", argv
    assert bench.run("no-such-program").content["code"] == "not_found"
    assert bench.run().content["code"] == "invalid_input"
    assert shell_tools(ToolsSettings()) == []


def test_programs_inside_a_root_are_not_found(tmp_path: Path) -> None:
    """Catches a program that a tool could have written itself, or a relative PATH entry."""
    planted = tmp_path / "bin"
    planted.mkdir()
    (planted / "tool").write_text("#!/bin/sh\n")
    (planted / "tool").chmod(0o755)
    assert resolve_program("tool", {"tool"}, str(planted))[0] == str(planted / "tool")
    for path in (str(planted), ".", "", f"{planted}/../bin"):
        with pytest.raises(NotFound):
            resolve_program("tool", {"tool"}, path, [tmp_path])
    with pytest.raises(Forbidden):
        resolve_program("tool", {"other"}, str(planted))


def test_cwd_is_confined(bench: Bench, tmp_path: Path) -> None:
    """Catches a command that starts outside its root."""
    (bench.root / "out").symlink_to(tmp_path)
    assert bench.python("import os; print(os.getcwd())", cwd="sub")["stdout"] == f"{bench.root}/sub\n"
    for cwd in ("out", "..", "/", "missing"):
        assert bench.run("echo", cwd=cwd).is_error


def test_path_rules_leave_no_commands(bench: Bench) -> None:
    """Catches a command that reads what the run forbids: nothing could hold it to the rules."""
    scope = ToolScope(roots={"r": bench.root}, paths_forbidden=("secret",))
    assert bench.run("echo", "x", scope=scope).content["code"] == "forbidden"


def test_floods_on_both_pipes_are_bounded(bench: Bench) -> None:
    """Catches a deadlock on a full pipe, unbounded memory, and a loss of the end, which tells most."""
    code = (
        "import sys\n"
        "for n in range(40000):\n"
        "    sys.stdout.write(f'o{n} ' * 10); sys.stderr.write(f'\\x1b{n} ' * 10)\n"
        "print('LAST')\n"
    )
    result = bench.run(PYTHON, "-c", code, settings={"result_max_bytes": 8192})
    got = result.content
    assert result.truncated
    assert got["exit_code"] == 0
    assert got["stdout"].startswith("o0 o0")
    assert got["stdout"].endswith("LAST\n")
    assert "bytes left out" in got["stdout"]
    assert got["stdout_bytes"] > 2_000_000
    assert len(str(got)) < 12_000


def test_output_that_just_fits_is_whole(bench: Bench) -> None:
    """Catches output marked as cut, or doubled, when its head and tail meet."""
    for size in (0, 1, 2047, 2048, 2049, 4000):
        result = bench.run(PYTHON, "-c", f"print('x' * {size}, end='')", settings={"result_max_bytes": 12288})
        assert result.content["stdout"] == "x" * size
        assert not result.truncated


FORKING = """
import os, sys, time
# {mark}
if os.fork() == 0:
    {escape}
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)
print("ready", flush=True)
{end}
"""


def cut_off(run: Callable[[float], dict[str, Any]]) -> dict[str, Any]:
    """The result of a program that never ends, cut off after it has printed something.

    Args:
        run: Runs it for so many seconds; a busy machine may take longer than the first of them to start it.
    """
    for limit_s in (1.5, 6.0, 24.0):
        if (got := run(limit_s))["stdout"]:
            return got
    raise AssertionError(f"it printed nothing within {limit_s} s: {got}")


@pytest.mark.parametrize("escape", ["pass", "os.setsid()"])
@pytest.mark.parametrize("end", ["sys.exit(0)", "time.sleep(600)"])
def test_no_child_survives(bench: Bench, escape: str, end: str) -> None:
    """Catches background children, in the group or in a session of their own, that outlive the command."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    code = FORKING.format(mark=mark, escape=escape, end=end)
    if "sleep" in end:
        got = cut_off(lambda limit_s: bench.python(code, deadline_s=60, timeout_s=limit_s))
    else:
        got = bench.python(code)
    assert got["stdout"] == "ready\n"
    if "sleep" in end:
        assert (got["timed_out"], got["exit_code"], got["signal"]) == (True, None, "SIGKILL")
    else:
        assert (got["timed_out"], got["exit_code"]) == (False, 0)
    assert survivors(mark) == []


def test_cancelled_command_leaves_nothing(bench: Bench) -> None:
    """Catches a command that goes on after its caller was cancelled; when the cancel returns, it is dead."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    code = FORKING.format(mark=mark, escape="os.setsid()", end="open('up', 'w'); time.sleep(600)")

    async def work() -> None:
        call = asyncio.ensure_future(
            bench.box().call(
                LOCAL_OWNER,
                "shell_run",
                {"argv": [PYTHON, "-c", code]},
                deadline=Deadline.after(60),
                scope=ToolScope(roots={"r": bench.root}),
            )
        )
        while not (bench.root / "up").exists():
            await asyncio.sleep(0.01)
        assert survivors(mark)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert survivors(mark) == []

    asyncio.run(work())


def test_command_dies_with_its_server(bench: Bench, tmp_path: Path) -> None:
    """Catches commands left behind by `kill -9` of the server."""
    mark = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    code = FORKING.format(mark=mark, escape="os.setsid()", end="open('up', 'w'); time.sleep(600)")
    server = f"""
import asyncio
from pathlib import Path
from tests_shell_bench import Bench, PYTHON
from agentic_flow.tools.audit import AuditLog
bench = Bench(Path({str(bench.root)!r}), AuditLog(Path({str(tmp_path / "other.db")!r})))
bench.run(PYTHON, "-c", {code!r}, deadline_s=60)
"""
    (tmp_path / "tests_shell_bench.py").write_text(Path(__file__).read_text())
    process = psutil.Popen(
        [sys.executable, "-c", server],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"},
    )
    try:
        while not (bench.root / "up").exists():
            assert process.poll() is None
            time.sleep(0.01)
        running = [p for p in survivors(mark) if p.pid != process.pid]
        assert running
    finally:
        process.kill()
        process.wait()
    assert not psutil.wait_procs(running, timeout=30)[1]


def test_deadline_of_the_call_returns_what_was_printed(bench: Bench) -> None:
    """Catches output lost because the ToolBox's limit struck before the command's own."""
    code = "import time; print('so far', flush=True); time.sleep(600)"
    got = cut_off(lambda limit_s: bench.python(code, deadline_s=60, settings={"timeout_s": limit_s}))
    assert (got["timed_out"], got["stdout"]) == (True, "so far\n")


def test_limits_hold(bench: Bench) -> None:
    """Catches limits that are set on the wrong process or not at all."""
    small = ShellLimits(memory_max_bytes=512 * 1024**2, file_max_bytes=1000, open_files_max=20)
    memory = bench.python("x = bytearray(2**30)", limits=small)
    assert memory["exit_code"] == 1
    assert "MemoryError" in memory["stderr"]
    big = bench.python("with open('f', 'wb') as f: f.write(b'x' * 5000)", limits=small)
    assert "File too large" in big["stderr"]
    assert (bench.root / "f").stat().st_size <= 1000
    files = bench.python("[open('/dev/null') for _ in range(50)]", limits=small)
    assert "Too many open files" in files["stderr"]
    spin = bench.python("while True: pass", timeout_s=1)
    assert (spin["timed_out"], spin["signal"]) == (True, "SIGKILL")


def test_what_cannot_be_executed_is_said(bench: Bench, tmp_path: Path) -> None:
    """Catches a failed exec reported as exit code 127 of a program that never ran."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "no-such-program").write_bytes(b"\x7fELF garbage")
    (folder / "no-such-program").chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{before}:{folder}"
    try:
        result = bench.run("no-such-program")
    finally:
        os.environ["PATH"] = before
    assert result.is_error
    assert "cannot be started" in result.content["message"]


def test_descriptors_and_threads_are_given_back(bench: Bench) -> None:
    """Catches pipes or processes that are not closed after a command."""
    bench.run("echo", "x")
    before = len(os.listdir("/proc/self/fd"))
    others = psutil.Process().children()  # of the tests before this one
    for _ in range(5):
        bench.run("echo", "x")
        bench.run("sh", "-c", "exit 1")
    assert len(os.listdir("/proc/self/fd")) <= before
    assert set(psutil.Process().children()) <= set(others)
