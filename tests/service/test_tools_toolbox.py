"""The ToolBox: one call through validation, policy, limits, bounds and audit."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from structlog.testing import capture_logs

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Conflict, NotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import ToolBox, ToolResult, ToolScope
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.core.toolkit import Tool, ToolCall, ToolInput
from agentic_flow.tools.audit import AuditLog, Record
from agentic_flow.tools.bounds import bound_result
from agentic_flow.tools.files import file_tools
from agentic_flow.tools.policy import parse_policy
from agentic_flow.tools.toolbox import Approver, StandardToolBox

T = TypeVar("T")


class Note(ToolInput):
    text: Annotated[str, Field(max_length=10_000)]
    times: Annotated[int, Field(ge=1, le=5)] = 1
    tags: tuple[str, ...] = ()
    limit: Annotated[int, Field(ge=1)] = 1000


class Effects:
    """Tools whose effects the tests can see."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.started = asyncio.Event()

    async def add(self, call: ToolCall[Note]) -> JsonObject:
        self.notes += [call.arguments.text] * call.arguments.times
        return {"count": len(self.notes), "key": call.idempotency_key}

    async def show(self, call: ToolCall[Note]) -> JsonObject:
        match call.arguments.text:
            case "conflict":
                raise Conflict("somebody was faster", hint="read it again")
            case "crash":
                raise ZeroDivisionError("internal detail")
            case "hang":
                self.started.set()
                await asyncio.Event().wait()
            case "inner timeout":
                raise TimeoutError("a socket's, not ours")
            case _:
                pass
        return {"rows": [f"{n:05d}" for n in range(min(call.arguments.limit, 5000))], "cursor": "x"}

    def tools(self) -> list[Tool[Any]]:
        return [
            Tool("note_show", "Show notes.", Note, self.show),
            Tool("note_add", "Add notes.", Note, self.add, kind="write", idempotent=False,
                 private_arguments=frozenset({"text"})),
        ]  # fmt: skip


class Bench:
    def __init__(self, audit: AuditLog) -> None:
        self.audit = audit
        self.effects = Effects()

    def box(self, policy: str = "", approver: Approver | None = None, **limits: Any) -> StandardToolBox:
        return StandardToolBox(
            self.effects.tools(),
            settings=ToolsSettings(**limits),
            policy=parse_policy(policy, "policy.toml"),
            audit=self.audit,
            approver=approver,
        )

    def call(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        box: StandardToolBox | None = None,
        scope: ToolScope | None = None,
        principal: Principal = LOCAL_OWNER,
        deadline_s: float = 10,
    ) -> ToolResult:
        return asyncio.run(
            (box or self.box()).call(
                principal,
                name,
                arguments,
                deadline=Deadline.after(deadline_s),
                scope=scope or ToolScope(run_id="run-1", agent="worker-1"),
                idempotency_key="key-1",
            )
        )

    def records(self, tenant: str = "default") -> list[Record]:
        return run(self.audit.records(tenant))


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    audit = AuditLog(tmp_path / "audit.db")
    yield Bench(audit)
    audit.close()


ALLOW = '[defaults]\nwrite = "allow"\ndestructive = "allow"\n'


def test_it_is_a_toolbox(bench: Bench) -> None:
    """Catches a signature that drifted from the port (checked by the type checker as well)."""
    box: ToolBox = bench.box()
    assert [spec.name for spec in box.specs(LOCAL_OWNER, ToolScope())] == ["note_show"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["'text'", "missing"]),
        ({"text": 3}, ["'text'", "3", "string"]),
        ({"text": "x", "times": "2"}, ["'times'", "'2'", "integer"]),
        ({"text": "x", "times": 9}, ["'times'", "9", "5"]),
        ({"text": "x", "tmes": 2}, ["'tmes'", "no argument"]),
        ({"text": "x", "tags": "a"}, ["'tags'"]),
        ({"text": "\ud800"}, ["JSON"]),
        ({"text": object()}, ["JSON"]),
    ],
)
def test_arguments_are_strict_and_named(bench: Bench, arguments: dict[str, Any], words: list[str]) -> None:
    """Catches silent conversion, ignored keys, an effect in spite of bad arguments, and mute messages."""
    result = bench.call("note_add", arguments, box=bench.box(ALLOW))
    assert result.is_error
    assert result.content["code"] == "invalid_input"
    for word in words:
        assert word in result.content["message"]
    assert "note_add takes text (string, required), times (integer 1..5)" in result.content["hint"]
    assert bench.effects.notes == []
    assert [record.outcome for record in bench.records()] == ["refused"]


def test_call_runs_and_is_recorded_before_and_after(bench: Bench) -> None:
    """Catches an effect without record, private text in the log, and a lost idempotency key."""
    result = bench.call("note_add", {"text": "my diary", "times": 2}, box=bench.box(ALLOW))
    assert result.content == {"count": 2, "key": "key-1"}
    assert bench.effects.notes == ["my diary"] * 2
    started, ended = bench.records()
    assert (started.outcome, ended.outcome) == ("started", "ok")
    assert (ended.tool, ended.run_id, ended.agent, ended.idempotency_key) == (
        "note_add",
        "run-1",
        "worker-1",
        "key-1",
    )
    assert ended.decision == "allow:default"
    assert "diary" not in ended.arguments
    assert orjson.loads(ended.arguments)["times"] == 2
    assert run(bench.audit.verify()) is None


def test_scope_hides_tools(bench: Bench) -> None:
    """Catches a tool outside the scope that is listed, callable, or distinguishable from one that is not."""
    scope = ToolScope(tools_allowed=frozenset({"note_show"}))
    box = bench.box(ALLOW)
    assert [spec.name for spec in box.specs(LOCAL_OWNER, scope)] == ["note_show"]
    with pytest.raises(NotFound) as hidden:
        bench.call("note_add", {"text": "x"}, box=box, scope=scope)
    assert hidden.value.message == "there is no tool 'note_add' here"
    with pytest.raises(NotFound, match="no tool 'note_shw'") as unknown:
        bench.call("note_shw", {}, box=box)
    assert unknown.value.hint == "did you mean 'note_show'?"
    assert [record.outcome for record in bench.records()] == ["refused", "refused"]
    assert bench.effects.notes == []


def test_writes_need_permission(bench: Bench) -> None:
    """Catches a write that passes without a rule, and a refusal that does not say how to permit it."""
    result = bench.call("note_add", {"text": "x"})
    assert result.content["code"] == "policy_denied"
    assert "tools.policy_file" in result.content["hint"]
    assert bench.effects.notes == []
    assert bench.records()[0].decision == "ask:default"


def test_approver_decides(bench: Bench) -> None:
    """Catches an approval that is not asked for, not obeyed, or asked with other arguments than run."""
    asked: list[tuple[str, JsonObject]] = []

    def answering(yes: bool) -> Approver:
        async def approve(principal: Principal, tool: Tool[Any], arguments: JsonObject) -> bool:
            asked.append((tool.name, arguments))
            return yes

        return approve

    declined = bench.call("note_add", {"text": "no"}, box=bench.box(approver=answering(False)))
    assert declined.content["code"] == "policy_denied"
    assert bench.effects.notes == []
    bench.call("note_add", {"text": "yes"}, box=bench.box(approver=answering(True)))
    assert bench.effects.notes == ["yes"]
    assert asked[1] == ("note_add", {"text": "yes", "times": 1, "tags": [], "limit": 1000})
    decisions = [record.decision for record in bench.records()]
    assert decisions == ["ask:default:declined", *["ask:default:approved"] * 2]


def test_silent_or_crashing_approver_is_no_yes(bench: Bench) -> None:
    """Catches a call that goes ahead, or waits for ever, when nobody answers."""

    async def silent(principal: Principal, tool: Tool[Any], arguments: JsonObject) -> bool:
        await asyncio.Event().wait()
        return True

    async def crashing(principal: Principal, tool: Tool[Any], arguments: JsonObject) -> bool:
        raise RuntimeError("no terminal")

    unanswered = bench.call("note_add", {"text": "x"}, box=bench.box(approver=silent), deadline_s=0.05)
    assert unanswered.content["code"] == "policy_denied"
    with capture_logs() as logs:
        crashed = bench.call("note_add", {"text": "x"}, box=bench.box(approver=crashing))
    assert crashed.is_error
    assert len(logs) == 1
    assert bench.effects.notes == []


def test_denied_by_principal(bench: Bench) -> None:
    """Catches a rule on a subject that binds everybody or nobody, and a denied tool that is still listed."""
    policy = ALLOW + '[[rules]]\neffect = "deny"\ntools = "note_*"\nsubject = "bot-*"\n'
    box = bench.box(policy)
    bot = Principal("default", "bot-7")
    assert box.specs(bot, ToolScope()) == []
    assert bench.call("note_show", {"text": "x"}, box=box, principal=bot).content["code"] == "policy_denied"
    assert not bench.call("note_show", {"text": "x"}, box=box).is_error


def test_failures_are_readable_and_logged_once(bench: Bench) -> None:
    """Catches internals shown to a model, a crash that kills the agent, and a crash nobody hears of."""
    with capture_logs() as logs:
        conflict = bench.call("note_show", {"text": "conflict"})
    assert conflict.content == {
        "code": "conflict",
        "message": "somebody was faster",
        "retryable": False,
        "hint": "read it again",
    }
    assert logs == []
    with capture_logs() as logs:
        crash = bench.call("note_show", {"text": "crash"})
    assert crash.is_error
    assert "internal detail" not in str(crash.content)
    assert [entry["event"] for entry in logs] == ["tool_crashed"]
    with capture_logs():
        inner = bench.call("note_show", {"text": "inner timeout"})
    assert inner.content["code"] == "internal"  # not reported as our own deadline


@pytest.mark.parametrize(("timeout_s", "deadline_s"), [(0.05, 10), (10, 0.05)])
def test_the_earlier_deadline_ends_the_call(bench: Bench, timeout_s: float, deadline_s: float) -> None:
    """Catches a call that outlives either limit."""
    result = bench.call(
        "note_show", {"text": "hang"}, box=bench.box(timeout_s=timeout_s), deadline_s=deadline_s
    )
    assert result.content["code"] == "deadline_exceeded"
    assert bench.records()[-1].outcome == "timeout"


def test_no_time_left_runs_nothing(bench: Bench) -> None:
    """Catches a call that starts after its deadline."""
    result = bench.call("note_add", {"text": "x"}, box=bench.box(ALLOW), deadline_s=0)
    assert result.content["code"] == "deadline_exceeded"
    assert bench.effects.notes == []


def test_cancellation_passes_through_and_is_recorded(bench: Bench) -> None:
    """Catches a swallowed cancellation, and a cancelled call without a record."""

    async def work() -> None:
        bench.effects.started = asyncio.Event()
        call = asyncio.ensure_future(
            bench.box().call(
                LOCAL_OWNER, "note_show", {"text": "hang"}, deadline=Deadline.after(10), scope=ToolScope()
            )
        )
        await bench.effects.started.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(work())
    run(bench.audit.append(_entry(bench)))  # queued after it, so it is there once this returns
    assert bench.records()[0].outcome == "cancelled"


def _entry(bench: Bench) -> Any:
    from agentic_flow.tools.audit import Entry

    return Entry(0.0, "default", "s", None, None, "t", None, {}, "none", "ok")


def test_large_results_are_cut_and_say_so(bench: Bench) -> None:
    """Catches an oversized result, a cut without a word, and a cursor that would skip what was cut."""
    box = bench.box(result_max_bytes=2000)
    result = bench.call("note_show", {"text": "x", "limit": 1000}, box=box)
    assert result.truncated
    assert result.content["truncated"] is True
    assert len(orjson.dumps(result.content)) <= 2000
    kept = len(result.content["rows"])
    assert result.content["rows"] == [f"{n:05d}" for n in range(kept)]
    assert f"limit={kept}" in result.content["more"]
    assert "cursor" not in result.content
    again = bench.call("note_show", {"text": "x", "limit": kept}, box=box)
    assert again.content == {"rows": result.content["rows"], "cursor": "x"}
    assert not again.truncated


def test_nothing_is_answered_that_cannot_be_recorded(bench: Bench) -> None:
    """Catches results that go out while the audit log is gone."""
    bench.audit.close()
    with pytest.raises(Exception, match="closed"):
        bench.call("note_show", {"text": "x"})


def test_schemas_are_closed_objects_for_models() -> None:
    """Catches a tool whose schema lets unknown arguments through or has nothing to say about one."""
    for tool in file_tools():
        schema = tool.spec.input_schema
        assert schema["type"] == "object"
        assert schema["additionalProperties"] is False
        assert "title" not in orjson.dumps(schema).decode()
        for name, part in schema["properties"].items():
            assert part.get("description"), (tool.name, name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=30) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=60,
)


@given(
    st.dictionaries(
        st.sampled_from(["rows", "text", "info", "cursor", "n", "more", "truncated"]), json_values
    ),
    st.integers(300, 4000),
)
def test_bounds_hold_for_any_result(content: dict[str, Any], max_bytes: int) -> None:
    """Catches a result past its limit, an unmarked cut, and a list cut inside an element."""
    bounded, cut = bound_result(content, max_bytes, limit_argument=True)
    assert len(orjson.dumps(bounded)) <= max_bytes
    if not cut:
        assert bounded is content
        return
    assert bounded["truncated"] is True
    assert bounded["more"]
    for key, value in bounded.items():
        if isinstance(value, list):
            assert value == content[key][: len(value)]
        elif isinstance(value, str) and key != "more":
            assert content[key].startswith(value)
