"""Local models by the real onnxruntime-genai, on a tiny decoder, beside plain onnxruntime."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import openai
import psutil
import pytest
from tokenizers import Tokenizer

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DataCorrupted,
    DeadlineExceeded,
    InvalidInput,
    InvalidSettings,
    LimitExceeded,
    ProviderFailed,
    Unavailable,
    UnknownModel,
)
from agentic_flow.core.messages import (
    CompletionRequest,
    ImagePart,
    Message,
    StreamEnd,
    StreamEvent,
    TextDelta,
    TextPart,
    ToolCallDelta,
    ToolResultPart,
    ToolSpec,
)
from agentic_flow.core.settings import GatewaySettings, OnnxSettings, Settings
from agentic_flow.core.web import create_app
from agentic_flow.gateway.front.errors import ERROR_SHAPES
from agentic_flow.gateway.front.routes import build_front_routes
from agentic_flow.gateway.onnx import QUEUE_MAX, OnnxProvider
from agentic_flow.gateway.service import Gateway
from agentic_flow.testing import completer_contract as contract
from agentic_flow.testing.onnx_fixture import (
    HEAD_SIZE,
    KV_HEADS,
    LAYERS,
    SPECIALS,
    TOOLS_TEMPLATE,
    write_decoder,
)
from agentic_flow.testing.serving import serving

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="no wheel of onnxruntime for this machine")
pytestmark = pytest.mark.anyio
CONTEXT = 32_768
TIMEOUT_S = 60.0
SAID = ("Let me", " look", " at the ", "🎻", ".\n")
CALL = ("<tool_call>\n", '{"name": "look_up", "arguments": ', '{"q": "a"}}', "\n</tool_call>")
TOOL = ToolSpec(name="look_up", description="Looks up.", input_schema={"type": "object"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models: one that babbles without end, one with a text to say, one that calls a tool."""
    folder = tmp_path_factory.mktemp("models")
    write_decoder(folder / "babble", context_tokens=CONTEXT)
    write_decoder(folder / "says", script=SAID)
    write_decoder(folder / "calls", script=("Wait.\n", *CALL), template=TOOLS_TEMPLATE)
    (folder / "no-model").mkdir()
    return folder


@asynccontextmanager
async def provider_of(models_dir: Path, **more: Any) -> AsyncIterator[OnnxProvider]:
    provider = OnnxProvider(OnnxSettings(models_dir=models_dir, threads=1, **more))
    try:
        yield provider
    finally:
        await provider.close()


def ask(model: str, text: str = "hello there", **more: Any) -> CompletionRequest:
    return CompletionRequest(model=model, messages=(contract.user(text),), **more)


def soon() -> Deadline:
    return Deadline.after(TIMEOUT_S)


def events_of(
    provider: OnnxProvider, request: CompletionRequest, deadline: Deadline | None = None
) -> AsyncGenerator[StreamEvent]:
    return cast(AsyncGenerator[StreamEvent], provider.stream(request, deadline=deadline or soon()))


def model_processes() -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it ends while it is looked at
            alive = child.status() != psutil.STATUS_ZOMBIE
            if alive and any("onnx_worker" in word for word in child.cmdline()):
                found.append(child)
    return found


def plain_greedy(folder: Path, prompt: str, tokens: int) -> list[int]:
    """What plain onnxruntime chooses, one step after the other, each with the cache of the one before."""
    runtime: Any = onnxruntime
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fed = list(tokenizer.encode(prompt).ids)
    names = [f"{layer}.{what}" for layer in range(LAYERS) for what in ("key", "value")]
    cache = {name: np.zeros((1, KV_HEADS, 0, HEAD_SIZE), np.float32) for name in names}
    seen, chosen = 0, []
    for _ in range(tokens):
        seen += len(fed)
        inputs = {"input_ids": np.array([fed], np.int64), "attention_mask": np.ones((1, seen), np.int64)}
        outputs = session.run(
            ["logits", *(f"present.{name}" for name in names)],
            {**inputs, **{f"past_key_values.{name}": cache[name] for name in names}},
        )
        fed = [int(outputs[0][0, -1].argmax())]
        cache = dict(zip(names, outputs[1:], strict=True))
        chosen += fed
    return chosen


@pytest.mark.parametrize(("seed", "repeated"), [(1, 20), (2, 40), (6, 60)])
async def test_greedy_tokens_are_those_of_plain_onnxruntime(tmp_path: Path, seed: int, repeated: int) -> None:
    """Catches a prompt that is not the template's, a cache used wrongly, and tokens lost or doubled."""
    folder = write_decoder(tmp_path / "tiny", seed=seed)
    text = "What is it? " * repeated
    prompt = f"<|system|>Be brief.<|end|><|user|>{text}<|end|><|assistant|>"
    expected = plain_greedy(folder, prompt, 80)
    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    system = Message(role="system", parts=(TextPart(text="Be brief."),))
    request = CompletionRequest(
        model="tiny", messages=(system, contract.user(text)), output_tokens_max=80, temperature=0
    )
    async with provider_of(tmp_path) as provider:
        completion = await provider.complete(request, deadline=soon())
    assert completion.text == tokenizer.decode(expected)
    assert completion.usage.input_tokens == len(tokenizer.encode(prompt).ids)
    assert completion.usage.output_tokens == 80
    assert completion.stop_reason == "length"
    assert len(set(expected)) > 5, "a model that repeats itself proves little"


async def test_streaming_gives_whole_characters_and_what_complete_gives(models: Path) -> None:
    """Catches deltas that differ from the whole answer, and characters cut between tokens."""
    async with provider_of(models) as provider:
        whole = await provider.complete(ask("says"), deadline=soon())
        async with aclosing(events_of(provider, ask("says"))) as stream:
            events = [event async for event in stream]
    deltas = [event.text for event in events if isinstance(event, TextDelta)]
    end = events[-1]
    assert isinstance(end, StreamEnd)
    assert deltas == list(SAID)
    assert end.completion == whole
    # Four tokens of text, the fiddle in four bytes, and the end.
    assert (whole.text, whole.stop_reason, whole.usage.output_tokens) == ("".join(SAID), "end", 9)


@pytest.mark.parametrize(
    ("limits", "text", "reason", "tokens"),
    [
        ({"output_tokens_max": 2}, "Let me look", "length", 2),
        ({"output_tokens_max": 8}, "".join(SAID), "length", 8),
        ({"output_tokens_max": 9}, "".join(SAID), "end", 9),
        ({"stop": ("🎻",)}, "Let me look at the ", "stop_sequence", 7),
        ({"stop": ("ook at", "never")}, "Let me l", "stop_sequence", 3),
        ({"stop": ("me look at me",)}, "".join(SAID), "end", 9),
    ],
)
async def test_an_answer_ends_where_and_why_it_should(
    models: Path, limits: dict[str, Any], text: str, reason: str, tokens: int
) -> None:
    """Catches a limit off by one, an end that is called a cut, and tokens counted that were not needed."""
    async with provider_of(models) as provider:
        got = await provider.complete(ask("says", **limits), deadline=soon())
    assert (got.text, got.stop_reason, got.usage.output_tokens) == (text, reason, tokens)


async def test_sampling_follows_the_seed_and_temperature_zero_is_greedy(models: Path) -> None:
    """Catches a temperature, top_p or seed that is not passed on (top_k is 1 in the folder)."""

    async with provider_of(models) as provider:

        async def text(**more: Any) -> str:
            request = ask("babble", output_tokens_max=30, **more)
            return (await provider.complete(request, deadline=soon())).text

        greedy = await text()
        assert await text(temperature=0, seed=5) == greedy
        assert await text(top_p=0.0) == greedy
        drawn = await text(temperature=1.0, seed=5)
        assert drawn == await text(temperature=1.0, seed=5)
        assert len({greedy, drawn, await text(temperature=1.0, seed=6), await text(top_p=0.9, seed=5)}) == 4
        assert await text(temperature=1.0, seed=2**40 + 5) == drawn


async def test_a_reader_who_leaves_frees_the_turn(models: Path) -> None:
    """Catches a generation that computes on for nobody: the next caller would wait for all of its tokens."""
    async with provider_of(models, concurrent_max=1) as provider:
        for _ in range(3):
            async with aclosing(events_of(provider, ask("babble", output_tokens_max=30_000))) as stream:
                assert isinstance(await anext(stream), TextDelta)
        task = asyncio.create_task(
            provider.complete(ask("babble", output_tokens_max=30_000), deadline=Deadline.after(TIMEOUT_S))
        )
        waiting = events_of(provider, ask("babble", "x", output_tokens_max=5))
        first = asyncio.ensure_future(anext(waiting))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert isinstance(await first, TextDelta)
        assert isinstance([event async for event in waiting][-1], StreamEnd)
        assert len(model_processes()) == 1, "the process serves on"


async def test_the_deadline_ends_an_answer_and_a_wait(models: Path) -> None:
    """Catches an answer that goes on after its deadline, and a caller that waits beyond its own."""
    async with provider_of(models, concurrent_max=1) as provider:
        await provider.complete(ask("babble", output_tokens_max=1), deadline=soon())
        async with aclosing(events_of(provider, ask("babble", output_tokens_max=30_000))) as stream:
            await anext(stream)
            with pytest.raises(DeadlineExceeded, match="a turn"):
                await provider.complete(ask("babble"), deadline=Deadline.after(0.05))
        # The turn is free and the process answers, so that the time goes into the answer alone.
        await provider.complete(ask("babble", output_tokens_max=1), deadline=soon())
        with pytest.raises(DeadlineExceeded, match="the answer"):
            await provider.complete(ask("babble", output_tokens_max=30_000), deadline=Deadline.after(1.0))
        got = await provider.complete(ask("babble", output_tokens_max=2), deadline=soon())
        assert got.usage.output_tokens == 2


async def test_two_answers_are_generated_at_once_and_a_third_waits(models: Path) -> None:
    """Catches answers that block each other, texts that get mixed up, and more at once than allowed."""
    async with provider_of(models, concurrent_max=2) as provider:
        alone = [
            (await provider.complete(ask("babble", text, output_tokens_max=300), deadline=soon())).text
            for text in ("one", "another")
        ]
        assert alone[0] != alone[1]
        streams = [
            events_of(provider, ask("babble", text, output_tokens_max=300)) for text in ("one", "another")
        ]
        firsts = [await anext(stream) for stream in streams]  # both are under way
        third = asyncio.create_task(provider.complete(ask("babble", output_tokens_max=1), deadline=soon()))
        texts = []
        for first, stream in zip(firsts, streams, strict=True):
            assert not third.done() or stream is streams[1], "three answers at once"
            rest = [event async for event in stream]
            texts.append("".join(event.text for event in (first, *rest) if isinstance(event, TextDelta)))
        assert texts == alone
        assert (await third).usage.output_tokens == 1


async def test_a_slow_reader_holds_its_model_back(models: Path) -> None:
    """Catches an unbounded queue: what nobody reads yet would collect in memory."""
    async with (
        provider_of(models) as provider,
        aclosing(events_of(provider, ask("babble", output_tokens_max=30_000))) as stream,
    ):
        await anext(stream)
        # The two take turns: without a bound, a thousand texts would lie here now.
        await provider.complete(ask("babble", output_tokens_max=1_000), deadline=soon())
        [process] = model_processes()
        process.send_signal(signal.SIGKILL)
        unread: list[StreamEvent] = []

        async def read_each() -> None:
            async for event in stream:
                unread.append(event)  # noqa: PERF401 - those before the failure count

        with pytest.raises(ProviderFailed):
            await read_each()
    assert 1 < len(unread) < QUEUE_MAX


def cut(name: str, size: int | None) -> Callable[[Path], None]:
    def breaking(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        if size is not None:
            (folder / name).write_bytes(data[:size])

    return breaking


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def change(**about: Any) -> Callable[[Path], None]:
    def breaking(folder: Path) -> None:
        config = json.loads((folder / "genai_config.json").read_text())
        config["model"].update(about)
        (folder / "genai_config.json").write_text(json.dumps(config))

    return breaking


BREAKS = {
    "no config": cut("genai_config.json", None),
    "empty config": cut("genai_config.json", 0),
    "cut config": cut("genai_config.json", 300),
    "config of no object": put("genai_config.json", b"[]"),
    "config without a model": put("genai_config.json", b"{}"),
    "context of nothing": change(context_length=0),
    "context of no number": change(context_length="long"),
    "unknown kind": change(type="martian"),
    "other vocabulary": change(vocab_size=5),
    "no decoder": change(decoder=None),
    "no weights": cut("model.onnx", None),
    "empty weights": cut("model.onnx", 0),
    "cut weights": cut("model.onnx", 100_000),
    "other weights": put("model.onnx", bytes(range(256)) * 200),
    "no tokenizer": cut("tokenizer.json", None),
    "cut tokenizer": cut("tokenizer.json", 2_000),
    "no tokenizer config": cut("tokenizer_config.json", None),
    "cut tokenizer config": cut("tokenizer_config.json", 30),
    "template of no text": put("chat_template.jinja", b"\xff\xfe"),
}


@pytest.mark.parametrize("broken", sorted(BREAKS))
async def test_a_broken_folder_is_a_typed_error_and_nothing_more(
    models: Path, tmp_path: Path, broken: str
) -> None:
    """Catches a broken download that brings the gateway down, keeps a turn, or fails without saying where."""
    shutil.copytree(models / "says", tmp_path / "says")
    shutil.copytree(models / "says", tmp_path / "broken")
    BREAKS[broken](tmp_path / "broken")
    async with provider_of(tmp_path, concurrent_max=1) as provider:
        for _ in range(2):
            with pytest.raises(DataCorrupted) as refused:
                await provider.complete(ask("broken"), deadline=soon())
        assert str(tmp_path / "broken") in refused.value.message
        assert refused.value.hint
        assert (await provider.complete(ask("says"), deadline=soon())).stop_reason == "end"
        assert "says" in {info.id for info in await provider.models(deadline=soon())}


async def test_folders_are_found_by_name_only(models: Path, tmp_path: Path) -> None:
    """Catches a path that leads out of models_dir, a folder that is no model, and models_dir missing."""
    async with provider_of(models) as provider:
        for name in ("nothing", "..", "../" + models.name, str(models / "says"), "says/../says", ""):
            with pytest.raises(UnknownModel, match="no model folder"):
                await provider.complete(ask(name), deadline=soon())
        with pytest.raises(DataCorrupted, match="genai_config"):
            await provider.complete(ask("no-model"), deadline=soon())
        listed = await provider.models(deadline=soon())
        assert [(info.id, info.context_tokens) for info in listed] == [
            ("babble", CONTEXT),
            ("calls", 4096),
            ("says", 4096),
        ]
        assert provider.default_model == "babble"
        assert [provider.owns(name) for name in ("says", "no-model", "gpt-5")] == [True, False, False]
        assert not model_processes()
    async with provider_of(tmp_path / "nowhere") as provider:
        assert provider.configured
        assert provider.default_model is None
        for call in (provider.models(deadline=soon()), provider.complete(ask("says"), deadline=soon())):
            with pytest.raises(InvalidSettings, match="nowhere"):
                await call
    assert not OnnxProvider(OnnxSettings()).configured


LIBRARY = {
    "missing": ("raise ImportError('No module named onnxruntime_genai')", InvalidSettings, "onnx-genai"),
    "aborts": ("import os\nos.abort()", DataCorrupted, "SIGABRT"),
    "killed": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", Unavailable, "memory"),
    "memory": ("def Config(folder):\n    raise RuntimeError('std::bad_alloc')", Unavailable, "memory"),
}


@pytest.mark.parametrize("what", sorted(LIBRARY))
async def test_a_library_that_fails_is_a_typed_error(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Catches a crash of the library that takes the gateway along, and an error without the remedy."""
    code, kind, told = LIBRARY[what]
    (tmp_path / "onnxruntime_genai.py").write_text(code)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        async with provider_of(models, concurrent_max=1) as provider:
            for _ in range(2):
                with pytest.raises(kind) as refused:
                    await provider.complete(ask("says"), deadline=soon())
            assert told in f"{refused.value.message} {refused.value.hint}"


async def test_a_model_process_that_dies_is_an_error_and_loaded_again(models: Path) -> None:
    """Catches an answer that hangs or passes for complete when its process is killed."""
    async with provider_of(models, concurrent_max=1) as provider:
        async with aclosing(events_of(provider, ask("babble", output_tokens_max=30_000))) as stream:
            await anext(stream)
            [process] = model_processes()
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ProviderFailed, match="SIGKILL"):
                async for _ in stream:
                    pass
        got = await provider.complete(ask("babble", output_tokens_max=2), deadline=soon())
        assert got.usage.output_tokens == 2
        assert [child.pid for child in model_processes()] != [process.pid]


async def test_models_are_let_go_for_others(models: Path) -> None:
    """Catches more models than loaded_max, one let go while it answers, and processes left behind."""
    async with provider_of(models, loaded_max=1, concurrent_max=3) as provider:
        babble = events_of(provider, ask("babble", output_tokens_max=400))
        first = await anext(babble)
        others = [asyncio.create_task(provider.complete(ask("says"), deadline=soon())) for _ in range(2)]
        rest = [first, *[event async for event in babble]]
        assert isinstance(rest[-1], StreamEnd), "it was let go while it answered"
        assert [(await other).text for other in others] == ["".join(SAID)] * 2
        assert len(model_processes()) == 1
        await provider.complete(ask("babble", output_tokens_max=1), deadline=soon())
        assert len(model_processes()) == 1
    assert not model_processes()


async def test_a_load_that_nobody_waits_for_is_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a second load beside the one that was given up, or a turn lost with it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    (tmp_path / "sitecustomize.py").write_text(f"open({str(gate)!r}).read()  # waits for somebody who writes")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    async with provider_of(models, concurrent_max=1) as provider:
        with pytest.raises(DeadlineExceeded, match="loaded"):
            await provider.complete(ask("says"), deadline=Deadline.after(0.1))
        with await asyncio.to_thread(gate.open, "w"):  # waits for somebody who reads
            loading = model_processes()
            assert len(loading) == 1
        assert (await provider.complete(ask("says"), deadline=soon())).stop_reason == "end"
        assert model_processes() == loading


async def test_a_prompt_must_fit(models: Path) -> None:
    """Catches a prompt that is cut without a word, and an answer without an end of the context."""
    async with provider_of(models) as provider:
        with pytest.raises(LimitExceeded) as refused:
            await provider.complete(ask("says", "x" * 5000), deadline=soon())
        assert refused.value.details == {"input_tokens": 5003, "context_tokens": 4096}
        got = await provider.complete(ask("says", "x" * 4090, output_tokens_max=100), deadline=soon())
        assert (got.stop_reason, got.usage.input_tokens, got.usage.output_tokens) == ("length", 4093, 3)


IMAGE = ImagePart(media_type="image/png", data="AAAA")


@pytest.mark.parametrize(
    ("model", "request_of", "field"),
    [
        ("says", {"messages": (Message(role="user", parts=(IMAGE,)),)}, "messages"),
        ("says", {"tools": (TOOL,)}, "tools"),
        ("calls", {"tools": (TOOL,), "tool_choice": "required"}, "tool_choice"),
        ("calls", {"tools": (TOOL,), "tool_choice": "look_up"}, "tool_choice"),
        ("calls", {"tools": (TOOL,), "output_schema": {"type": "object"}}, "output_schema"),
        ("says", {"output_schema": {"type": "object", "if": {"required": ["a"]}}}, "output_schema"),
        ("says", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("says", {"temperature": -1.0}, "temperature"),
        ("says", {"top_p": 1.5}, "top_p"),
        ("says", {"messages": (contract.user("half\0lost"),)}, None),
        ("says", {"messages": (contract.user("\ud800"),)}, "messages"),
    ],
)
async def test_what_a_model_cannot_do_is_refused_by_name(
    models: Path, model: str, request_of: dict[str, Any], field: str | None
) -> None:
    """Catches something of a request that is dropped without a word."""
    async with provider_of(models) as provider:
        with pytest.raises(InvalidInput) as refused:
            await provider.complete(ask(model).model_copy(update=request_of), deadline=soon())
    assert refused.value.details.get("field") == field
    assert refused.value.hint


async def test_a_folder_without_or_with_a_refusing_template_is_refused(models: Path, tmp_path: Path) -> None:
    """Catches messages that are glued together for a model which was never taught to chat."""
    write_decoder(tmp_path / "base", template=None)
    write_decoder(tmp_path / "strict", template="{{ raise_exception('no system role') }}")
    async with provider_of(tmp_path) as provider:
        with pytest.raises(InvalidInput, match="chat template"):
            await provider.complete(ask("base"), deadline=soon())
        with pytest.raises(InvalidInput, match="no system role"):
            await provider.complete(ask("strict"), deadline=soon())


async def test_tool_calls_are_read_and_their_results_taken(models: Path) -> None:
    """Catches a call that comes as text, offered tools that do not reach the prompt, and results refused."""
    async with provider_of(models) as provider:
        plain = await provider.complete(ask("calls"), deadline=soon())
        asked = ask("calls", tools=(TOOL,))
        async with aclosing(events_of(provider, asked)) as stream:
            events = [event async for event in stream]
        end = events[-1]
        assert isinstance(end, StreamEnd)
        called = end.completion
        assert [event.name for event in events if isinstance(event, ToolCallDelta)] == ["look_up"]
        assert [(call.name, call.arguments) for call in called.tool_calls] == [("look_up", {"q": "a"})]
        assert (called.text, called.stop_reason) == ("Wait.\n", "tool_calls")
        assert plain.text == "Wait.\n" + "".join(CALL)
        assert called.usage.input_tokens > plain.usage.input_tokens + len(TOOL.name)
        result = ToolResultPart(id=called.tool_calls[0].id, name="look_up", content="found")
        messages = (
            *asked.messages,
            Message(role="assistant", parts=called.parts),
            Message(role="user", parts=(result,)),
        )
        after = await provider.complete(asked.model_copy(update={"messages": messages}), deadline=soon())
        assert after.usage.input_tokens > called.usage.input_tokens


async def test_a_schema_holds_the_model(models: Path) -> None:
    """Catches a schema that is not enforced: this model's own words are no JSON."""
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "c": {"enum": ["red", "blue"]}},
        "required": ["n", "c"],
        "additionalProperties": False,
    }
    async with provider_of(models) as provider:
        for seed in range(3):
            request = ask("babble", output_schema=schema, output_tokens_max=200, temperature=1.0, seed=seed)
            completion = await provider.complete(request, deadline=soon())
            value = json.loads(completion.text)
            assert completion.stop_reason == "end"
            assert set(value) == {"n", "c"}
            assert value["c"] in ("red", "blue")
            assert 0 <= value["n"] <= 99


@asynccontextmanager
async def gateway_of(models_dir: Path, **more: Any) -> AsyncIterator[Gateway]:
    settings = GatewaySettings.model_validate({"onnx": {"models_dir": models_dir, "threads": 1}, **more})
    async with Gateway(settings) as gateway:
        yield gateway


@pytest.mark.parametrize("stream", [False, True])
async def test_the_gateway_serves_them(models: Path, stream: bool) -> None:
    """Catches a local model that behaves unlike any other behind the gateway, or costs anything."""
    async with gateway_of(models) as gateway:
        assert gateway.default_model() == "onnx:babble"
        case = contract.CompleterCase(gateway, "onnx:says", stream=stream)
        for check in (
            contract.lists_its_model,
            contract.resolves_its_model,
            contract.refuses_unknown_models,
            contract.respects_a_spent_deadline,
            contract.a_stream_says_what_complete_says,
            contract.honours_tool_choice_none,
        ):
            await check(case)
        bare = await case.complete(ask("says"))
        assert (bare.provider, bare.model, bare.usage.cost_usd) == ("onnx", "says", 0.0)
        assert gateway.estimate_cost(ask("says")) == 0.0
        with pytest.raises(AgenticFlowError) as refused:
            await case.complete(ask("onnx:no-model"))
        assert refused.value.code == "data_corrupted"


class Anyone:
    """Takes the key that the SDK insists on."""

    async def authenticate(self, credential: str) -> Principal:
        return LOCAL_OWNER


async def test_the_openai_sdk_talks_to_a_local_model(models: Path) -> None:
    """Catches a local model that an unmodified client cannot use: whole, streamed, cut, refused."""

    async def ready() -> dict[str, bool]:
        return {}

    async with gateway_of(models) as gateway:
        app = create_app(
            "platform",
            build_front_routes(gateway),
            authenticator=Anyone(),
            settings=Settings(),
            ready=ready,
            error_shapes=ERROR_SHAPES,
        )
        async with (
            serving(app) as (url,),
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as sdk,
        ):
            create: Any = sdk.chat.completions.create
            hello = [{"role": "user", "content": "hello"}]
            whole = await create(model="onnx:says", messages=hello)
            assert whole.choices[0].message.content == "".join(SAID)
            assert whole.choices[0].finish_reason == "stop"
            assert whole.usage.completion_tokens == 9
            chunks = [chunk async for chunk in await create(model="says", messages=hello, stream=True)]
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == "".join(SAID)
            limited = await create(model="says", messages=hello, max_completion_tokens=2)
            assert limited.choices[0].finish_reason == "length"
            with pytest.raises(openai.UnprocessableEntityError, match="4096"):
                await create(model="says", messages=[{"role": "user", "content": "x" * 9000}])


def test_the_fixture_is_the_same_each_time(tmp_path: Path) -> None:
    """Catches a fixture whose weights change with the machine's mood, and special tokens out of order."""
    one, two = write_decoder(tmp_path / "one"), write_decoder(tmp_path / "two")
    assert (one / "model.onnx").read_bytes() == (two / "model.onnx").read_bytes()
    assert (one / "model.onnx").stat().st_size < 2_000_000
    tokenizer: Any = Tokenizer.from_file(str(one / "tokenizer.json"))
    assert (
        tokenizer.token_to_id(SPECIALS[0])
        == json.loads((one / "genai_config.json").read_text())["model"]["eos_token_id"][0]
    )
