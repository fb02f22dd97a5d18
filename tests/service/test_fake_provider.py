"""The fake provider itself: it must be as strict and as real as the tests that lean on it believe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.testing.fake_provider import FakeProvider, Reply, Rule, load_rules

ANTHROPIC = {"x-api-key": "k", "anthropic-version": "2023-06-01", "content-type": "application/json"}
OPENAI = {"authorization": "Bearer k", "content-type": "application/json"}
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


def post(url: str, body: Any, headers: dict[str, str]) -> tuple[int, Any]:
    """Status and parsed answer; the bytes when it is no JSON."""
    sent = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(sent, timeout=20) as answer:
            content = answer.read()
            status = answer.status
    except urllib.error.HTTPError as error:
        with error:
            content, status = error.read(), error.code
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content


def messages(
    fake: FakeProvider, turns: Any, headers: dict[str, str] = ANTHROPIC, **more: Any
) -> tuple[int, Any]:
    body = {"model": "m", "max_tokens": 10, "messages": turns, **more}
    return post(f"{fake.anthropic_url}/v1/messages", body, headers)


def chat(fake: FakeProvider, turns: Any, headers: dict[str, str] = OPENAI, **more: Any) -> tuple[int, Any]:
    return post(f"{fake.openai_url}/chat/completions", {"model": "m", "messages": turns, **more}, headers)


def use(call_id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "t", "input": {}}


def result(call_id: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": "x"}


def turn(role: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "at least one message"),
        ([{"role": "assistant", "content": "x"}], "first message"),
        ([*HELLO, *HELLO], "alternate"),
        ([{"role": "system", "content": "x"}], "first message"),
        ([*HELLO, turn("assistant", use("a"))], "without `tool_result`"),
        ([*HELLO, turn("assistant", use("a")), {"role": "user", "content": "x"}], "without `tool_result`"),
        ([*HELLO, turn("assistant", use("a")), turn("user", result("b"))], "unexpected `tool_use_id`"),
        (
            [*HELLO, turn("assistant", use("a")), turn("user", {"type": "text", "text": "x"}, result("a"))],
            "come first",
        ),
        ([turn("user", {"type": "text", "text": ""})], "non-empty"),
        ([*HELLO, turn("assistant", {"type": "thinking", "thinking": "x"})], "signature"),
    ],
)
def test_anthropic_rules(turns: list[Any], said: str) -> None:
    """Catches a fake that takes what Anthropic refuses, which would prove nothing about our encoder."""
    with FakeProvider([Reply.text("x")]) as fake:
        status, body = messages(fake, turns)
    assert status == 400
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "empty array"),
        ([{"role": "tool", "tool_call_id": "a", "content": "x"}], "preceding message"),
        ([{"role": "user", "content": None}], "Invalid type"),
        ([{"role": "bot", "content": "x"}], "Invalid value"),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "t", "arguments": "{}"}}
                    ],
                },
                *HELLO,
            ],
            "must be followed by tool messages",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "t", "arguments": {}}}
                    ],
                }
            ],
            "expected a string",
        ),
    ],
)
def test_openai_rules(turns: list[Any], said: str) -> None:
    """Catches a fake that takes what OpenAI refuses."""
    with FakeProvider([Reply.text("x")]) as fake:
        status, body = chat(fake, turns)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


def test_headers_and_fields_are_demanded() -> None:
    """Catches a client without key, version or limit, or with fields that the vendor does not know."""
    with FakeProvider([Reply.text("x")], api_key="k") as fake:
        assert messages(fake, HELLO, {"anthropic-version": "2023-06-01"})[0] == 401
        assert messages(fake, HELLO, {**ANTHROPIC, "x-api-key": "other"})[0] == 401
        assert messages(fake, HELLO, {"x-api-key": "k"})[0] == 400
        assert messages(fake, HELLO, max_tokens=None)[0] == 400
        assert messages(fake, HELLO, invented=1)[0] == 400
        assert chat(fake, HELLO, {})[0] == 401
        assert chat(fake, HELLO, {"authorization": "k"})[0] == 401
        assert chat(fake, HELLO, stream_options={})[0] == 400
        assert chat(fake, HELLO, max_tokens=1, max_completion_tokens=1)[0] == 400
        assert messages(fake, HELLO)[0] == 200
        assert len(fake.requests) == 10
        assert [refused.request for refused in fake.refused] == list(range(9))


def test_a_list_is_played_in_order_and_then_refuses() -> None:
    """Catches more calls than were scripted that pass unnoticed."""
    with FakeProvider([Reply.text("one"), Reply.text("two")]) as fake:
        assert messages(fake, HELLO)[1]["content"] == [{"type": "text", "text": "one"}]
        assert chat(fake, HELLO)[1]["choices"][0]["message"]["content"] == "two"
        status, body = chat(fake, HELLO)
        assert status == 400
        assert "no reply for request 2" in body["error"]["message"]
        assert fake.requests[1].wire == "openai"
        assert fake.requests[1].last_text == "hello"


def test_rules_are_matched_and_counted() -> None:
    """Catches a rule used more often than it allows, or that matches what it should not."""
    rules = [
        Rule({"contains": "sum", "wire": "openai"}, Reply.text("4"), times=1),
        Rule({"system_contains": "critic"}, Reply.text("bad")),
        Rule({}, Reply.text("else")),
    ]
    with FakeProvider(rules) as fake:
        ask = [{"role": "user", "content": "the sum?"}]
        said = [chat(fake, ask)[1]["choices"][0]["message"]["content"] for _ in range(2)]
        assert said == ["4", "else"]
        assert messages(fake, HELLO, system="You are a critic")[1]["content"][0]["text"] == "bad"
    with pytest.raises(ValueError, match="unknown conditions"):
        Rule({"contians": "x"}, Reply())
    with pytest.raises(ValueError, match="unknown reply fields"):
        Reply.from_json({"txt": "x"})


def test_a_child_process_logs_before_it_answers(tmp_path: Path) -> None:
    """Catches lost calls in crash tests: every answered request must be on disk although we kill at once."""
    script, log = tmp_path / "rules.json", tmp_path / "seen.jsonl"
    rules = [{"when": {"contains": "hello"}, "reply": {"text": "hi", "input_tokens": 3}, "times": 2}]
    script.write_text(json.dumps(rules))
    assert load_rules(script)[0].reply.body_text == "hi"
    command = [sys.executable, "-m", "agentic_flow.testing.fake_provider"]
    with subprocess.Popen(
        [*command, "--script", str(script), "--log", str(log)], stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().strip()
            status, body = post(
                f"{url}/v1/messages",
                {"model": "m", "max_tokens": 5, "messages": HELLO},
                {**ANTHROPIC, "idempotency-key": "abc"},
            )
        finally:
            os.kill(child.pid, signal.SIGKILL)
    assert status == 200
    assert body["usage"]["input_tokens"] == 3
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["wire"], line["idempotency_key"]) for line in lines] == [("anthropic", "abc")]


def test_a_child_process_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    """Catches a server that survives its test or dies with a traceback."""
    script = tmp_path / "rules.json"
    script.write_text("[]")
    command = [sys.executable, "-m", "agentic_flow.testing.fake_provider", "--script", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("http://127.0.0.1:")
        child.terminate()
        _, errors = child.communicate(timeout=20)
    assert child.returncode == 0
    assert errors == ""
