"""Guardrails: what they see, what the built-in ones refuse, and what happens when one breaks."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Mapping
from typing import Any

import pytest
import structlog

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, PolicyDenied, Unavailable
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    Message,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    ToolSpec,
    Usage,
)
from agentic_flow.gateway.guardrails import GuardedAnswer, GuardedRequest, Guardrails
from agentic_flow.gateway.policies import Caller, GuardrailRule

pytestmark = pytest.mark.anyio

CALLER = Caller("acme", "k1")
KEY = "sk-ant-" + "api03-" + (string.ascii_letters + string.digits)[:40]


def chat(text: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def asked(sent: Any, tenant: str = "acme") -> GuardedRequest:
    return GuardedRequest(CALLER._replace(tenant=tenant), "m", sent)


def answered(answer: Any, **more: Any) -> GuardedAnswer:
    return GuardedAnswer(CALLER, "m", answer, **more)


def rule(name: str, tenant: str | None = None, **options: Any) -> GuardrailRule:
    return GuardrailRule(name=name, options=options, tenant=tenant)


async def refusal(sent: Any, *rules: GuardrailRule) -> str | None:
    """What the caller is told, None when the request may go."""
    told: PolicyDenied | None = None
    try:
        await Guardrails().compile(rules).before(asked(sent))
    except PolicyDenied as error:
        told = error
    assert told is None or (told.hint and told.details["guardrail"] == rules[0].name)
    return told and told.message


# What they see

IMAGE = "data:image/png;base64," + "A" * 5000
OURS = CompletionRequest(
    model="m",
    messages=(
        Message(role="system", parts=(TextPart(text="one"),)),
        Message(role="user", parts=(TextPart(text="two"), ImagePart(media_type="image/png", data="AAAA"))),
        Message(role="assistant", parts=(ToolCallPart(id="1", name="find", arguments={"q": ["three"]}),)),
        Message(role="user", parts=(ToolResultPart(id="1", name="find", content="four"),)),
    ),
    tools=(ToolSpec(name="find", description="five", input_schema={"description": "six"}),),
    output_tokens_max=77,
)
CHAT = {
    "model": "m",
    "max_completion_tokens": 77,
    "messages": [
        {"role": "system", "content": "one"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two"}, {"type": "image_url", "image_url": {"url": IMAGE}}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "find", "arguments": '{"q": ["thr\\u0065e"]}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "four"},
    ],
    "tools": [{"type": "function", "function": {"name": "find", "description": "five", "x": "six"}}],
}
MESSAGES = {
    "model": "m",
    "max_tokens": 77,
    "system": [{"type": "text", "text": "one"}],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "two"},
                {
                    "type": "image",
                    "source": {"type": "base64", "media_type": "image/png", "data": "A" * 5000},
                },
            ],
        },
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "input": {"q": ["three"]}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "four"}]},
        {"role": "assistant", "content": "find"},
    ],
    "tools": [{"name": "find", "description": "five", "input_schema": {"description": "six"}}],
}
RESPONSES = {
    "model": "m",
    "max_output_tokens": 77,
    "instructions": "one",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "two"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": IMAGE}]},
        {"type": "function_call", "call_id": "1", "name": "find", "arguments": '{"q": "three"}'},
        {"type": "function_call_output", "call_id": "1", "output": "four"},
    ],
    "tools": [{"type": "function", "name": "find", "description": "five", "parameters": {"title": "six"}}],
}


@pytest.mark.parametrize(
    "sent", [OURS, CHAT, MESSAGES, RESPONSES], ids=["ours", "chat", "messages", "responses"]
)
async def test_all_texts_are_seen_in_every_format(sent: Any) -> None:
    """Catches a place where text can hide from guardrails, and images taken for text."""
    request = asked(sent)
    assert {"one", "two", "three", "four", "five", "six", "find"} <= set(request.texts)
    assert "three" in request.text
    sizes = request.sizes
    assert (sizes.messages, sizes.images, sizes.tools, sizes.output_tokens) == (4, 1, 1, 77)
    assert sizes.characters == sum(map(len, request.texts)) < 120


async def test_texts_of_answers_are_seen() -> None:
    """Catches answers that guardrails see as empty."""
    parts = (TextPart(text="one"), ToolCallPart(id="1", name="f", arguments={"a": "two"}))
    ours = Completion(model="m", provider="p", parts=parts, stop_reason="end", usage=Usage())
    assert answered(ours).texts == ("one", "f", "two")
    assert "one" in answered({"choices": [{"message": {"role": "assistant", "content": "one"}}]}).texts
    assert answered("one").text == "one"


# Built in


@pytest.mark.parametrize(
    ("bound", "most"),
    [
        ("characters_max", 5),
        ("messages_max", 1),
        ("images_max", 0),
        ("tools_max", 0),
        ("output_tokens_max", 76),
    ],
)
async def test_each_size_has_a_bound(bound: str, most: int) -> None:
    """Catches a bound that is not looked at, or that hits what keeps within it."""
    limit = rule("max-size", **{bound: most})
    for sent in (OURS, CHAT, MESSAGES, RESPONSES):
        assert f"at most {most!r}" in (await refusal(sent, limit) or ""), sent
    assert await refusal(chat("12345", max_tokens=76), limit) is None


async def test_an_output_bound_needs_a_stated_limit() -> None:
    """Catches a bound that is evaded by saying nothing."""
    bound = rule("max-size", output_tokens_max=100)
    assert "names no limit" in (await refusal(chat(), bound) or "")
    assert await refusal(chat(), rule("max-size", messages_max=1)) is None


async def test_denied_patterns() -> None:
    """Catches a pattern that is not found, found in labels, or case that counts though it should not."""
    deny = rule("deny-patterns", patterns=["project\\s+falcon", "user"])
    assert "project\\\\s+falcon" in (await refusal(chat("about Project\n Falcon"), deny) or "")
    assert await refusal(chat("about falcons"), deny) is None
    assert (
        await refusal(chat("FALCON"), rule("deny-patterns", patterns=["falcon"], ignore_case=False)) is None
    )
    hidden = {"messages": [{"tool_calls": [{"function": {"arguments": '{"a": "f\\u0061lcon"}'}}]}]}
    assert await refusal(hidden, rule("deny-patterns", patterns=["falcon"]))
    compiled = Guardrails().compile([rule("deny-patterns", patterns=["falcon"], answers=True)])
    with pytest.raises(PolicyDenied, match="the answer matches"):
        await compiled.after(answered("a Falcon"))


@pytest.mark.timeout(60)
async def test_no_pattern_can_hang_the_gateway() -> None:
    """Catches patterns that take exponential time on the right text."""
    evil = rule(
        "deny-patterns", patterns=["(a+)+$x", "(a|a)*$x", "(.*)*,(.*)*;$x", "^(([a-z])+.)+[A-Z]([a-z])+$x"]
    )
    assert await refusal(chat("a" * 200_000 + "!"), evil) is None


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", "(a)\\1", "(a{1000}){1000}", "a{5000}", ""])
def test_patterns_that_cannot_be_linear_are_refused_at_policy_time(pattern: str) -> None:
    """Catches a policy that is accepted and fails with the first request."""
    with pytest.raises(InvalidInput) as refused:
        Guardrails().compile([rule("deny-patterns", patterns=[pattern])])
    assert repr(pattern) in refused.value.message or "patterns" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "text",
    [
        f"my key is {KEY}, use it",
        "-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----",
        "password=9fQz7Lk2WmXt4Rv8",
        " ".join(["word"] * 10_000) + f" {KEY} " + " ".join(["word"] * 10_000),
        "x " * 16_370 + KEY,
    ],
)
async def test_credentials_are_refused(text: str) -> None:
    """Catches a key that is sent to a vendor, also within a tool result; the error must not repeat it."""
    for sent in (chat(text), {"messages": [{"role": "tool", "content": [{"type": "text", "text": text}]}]}):
        message = await refusal(sent, rule("secrets"))
        assert message is not None
        assert KEY not in message


@pytest.mark.parametrize(
    "text",
    ["sk-ant-" + "x" * 40, "AKIAIOSFODNN7EXAMPLE", "password=changeme1", "mail jane@example.com", "sk-learn"],
)
async def test_placeholders_and_personal_data_are_no_credentials(text: str) -> None:
    """Catches documentation that cannot be worked on."""
    assert await refusal(chat(text), rule("secrets")) is None


# Plug-ins, tenants, streams, failures


class Picky:
    """A stranger's guardrail."""

    name = "picky"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.error: BaseException | None = options.get("error")
        self.seen: list[str] = []

    async def before(self, request: GuardedRequest) -> None:
        self.seen.append(request.text)
        await self._judge()

    async def after(self, answer: GuardedAnswer) -> None:
        self.seen.append(answer.text)
        await self._judge()

    async def _judge(self) -> None:
        if isinstance(self.error, TimeoutError):
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error


async def test_a_plug_in_is_asked_for_its_tenant_only() -> None:
    """Catches a rule that is applied to other tenants, or not to its own."""
    made: list[Picky] = []

    def factory(options: Mapping[str, Any]) -> Picky:
        made.append(Picky(options))
        return made[-1]

    compiled = Guardrails({"picky": factory}).compile([rule("picky"), rule("picky", tenant="acme")])
    assert not compiled.empty
    await compiled.before(asked(chat("ours")))
    await compiled.before(asked(chat("theirs"), tenant="other"))
    await compiled.after(answered("answer"))
    assert [picky.seen for picky in made] == [["ours", "theirs", "answer"], ["ours", "answer"]]
    assert Guardrails().compile([]).empty


async def test_a_refusal_after_a_stream_is_noted() -> None:
    """Catches an error after the last byte was sent, and one that nobody hears of."""
    rules = [rule("picky", error=PolicyDenied("no", hint="ask differently"))]
    all_of_them = Guardrails({"picky": Picky})
    compiled = all_of_them.compile(rules)
    with structlog.testing.capture_logs() as logs:
        await compiled.after(answered("gone", streamed=True))
    assert [line["event"] for line in logs] == ["guardrail_objected_late"]
    assert all_of_them.late == {"picky": 1}
    with pytest.raises(PolicyDenied) as refused:
        await compiled.after(answered("held"))
    assert refused.value.details == {"guardrail": "picky"}


async def test_a_guardrail_that_breaks_lets_nothing_pass() -> None:
    """Catches a gateway that goes on as though a broken guardrail had agreed, and one that hangs with it."""
    broken = Guardrails({"picky": Picky}).compile([rule("picky", error=ZeroDivisionError("secret"))])
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(AgenticFlowError, match="'picky' failed") as e,
    ):
        await broken.before(asked(chat()))
    assert "secret" not in str(e.value)
    assert [line["event"] for line in logs] == ["guardrail_failed"]
    stuck = Guardrails({"picky": Picky}, timeout_s=0.01).compile([rule("picky", error=TimeoutError())])
    with pytest.raises(Unavailable, match="did not decide") as late:
        await stuck.before(asked(chat()))
    assert late.value.is_of_request, "it is no reason to hold others back"


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (rule("max-sise"), "'max-sise'"),
        (rule("max-size"), "no bounds"),
        (rule("max-size", characters_max=0), "'characters_max'"),
        (rule("max-size", characters=1), "'characters'"),
        (rule("deny-patterns"), "'patterns'"),
        (rule("secrets", everything=True), "'everything'"),
    ],
)
def test_wrong_rules_are_refused_at_policy_time(wrong: GuardrailRule, shown: str) -> None:
    """Catches a misspelled guardrail that silently guards nothing."""
    with pytest.raises(InvalidInput) as refused:
        Guardrails().compile([wrong])
    assert shown in refused.value.message
    assert refused.value.hint
