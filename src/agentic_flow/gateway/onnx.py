"""The provider `onnx`: models in folders on this machine, run by onnxruntime-genai.

Every loaded model is a process (`onnx_process`), at most `loaded_max` of them, loaded one at a time when
first asked for, the one longest unused let go for another. At most `concurrent_max` answers are generated at
once; the others wait their turn, first come first served, within their deadlines.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import (
    OF_REQUEST,
    AgenticFlowError,
    DataCorrupted,
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    ProviderFailed,
    ProviderProtocol,
    Unavailable,
)
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    ImagePart,
    JsonObject,
    Message,
    ModelInfo,
    StopReason,
    StreamEnd,
    StreamEvent,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.core.settings import GatewaySettings, OnnxSettings
from agentic_flow.gateway.onnx_folders import ModelFolder, list_names, read_folder
from agentic_flow.gateway.onnx_process import Json, ModelProcess, post_to
from agentic_flow.gateway.onnx_text import AnswerReader
from agentic_flow.gateway.transport import HttpTransport
from agentic_flow.gateway.wire.format import check_structured, check_tool_choice, misplaced

_log = structlog.get_logger(__name__)

NAME = "onnx"
# Texts that the model may be ahead of its reader.
QUEUE_MAX = 64
# A cancelled answer ends after the token under way; one that reads a long prompt is not waited for longer.
STOP_GRACE_S = 5.0
NAMES_KNOWN_S = 2.0
_SEED_MAX = 2**31 - 1
Got = TypeVar("Got")


@dataclass(slots=True)
class _Loaded:
    process: ModelProcess
    users: int = 0


@dataclass(slots=True)
class _Shelf:
    """The loaded models, in the order of their last use."""

    loaded_max: int
    threads: int | None
    models: OrderedDict[Path, _Loaded] = field(default_factory=OrderedDict[Path, _Loaded])
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    freed: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, folder: Path) -> _Loaded:
        """The loaded model of a folder, with one more user.

        Who waits for room keeps the turn, so that a stream of calls to a loaded model cannot starve another.
        """
        await self.turn.acquire()
        loading: asyncio.Task[_Loaded] | None = None
        try:
            loaded = self.models.get(folder)
            if loaded is None or not loaded.process.alive:
                await self._make_room(folder)
                loading = asyncio.create_task(self._load(folder))
                loaded = await asyncio.shield(loading)
            self.models.move_to_end(folder)
            loaded.users += 1
            return loaded
        finally:
            if loading is None or loading.done():
                self.turn.release()
            else:  # nobody waits for it any more, but a load cannot be taken back: it keeps the turn
                loading.add_done_callback(self._loaded_for_nobody)

    def give_back(self, loaded: _Loaded) -> None:
        """One user less."""
        loaded.users -= 1
        self.freed.set()

    async def close(self) -> None:
        """End every process."""
        models = list(self.models.values())
        self.models.clear()
        await asyncio.gather(*(asyncio.to_thread(loaded.process.close) for loaded in models))

    async def _make_room(self, folder: Path) -> None:
        dead = self.models.pop(folder, None)
        if dead is not None:
            await asyncio.to_thread(dead.process.close)
        while len(self.models) >= self.loaded_max:
            self.freed.clear()
            idle = next((path for path, loaded in self.models.items() if loaded.users == 0), None)
            if idle is None:
                await self.freed.wait()
                continue
            leaving = self.models.pop(idle)
            _log.info("model_unloaded", model=idle.name)
            await asyncio.to_thread(leaving.process.close)

    async def _load(self, folder: Path) -> _Loaded:
        process = await asyncio.to_thread(ModelProcess.start, folder, self.threads)
        _log.info("model_loaded", model=folder.name, pid=process.pid)
        loaded = self.models[folder] = _Loaded(process)
        return loaded

    def _loaded_for_nobody(self, task: asyncio.Task[_Loaded]) -> None:
        self.turn.release()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.warning("model_load_failed", error=str(error))


class OnnxProvider:
    """`Provider` of the model folders in `models_dir`.

    Args:
        settings: The section `gateway.onnx`.
        clock: Says when to look for new folders again.
    """

    name = NAME
    setup_hint = "set gateway.onnx.models_dir to a folder of ONNX models"

    def __init__(self, settings: OnnxSettings, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._clock = clock
        self._shelf = _Shelf(settings.loaded_max, settings.threads)
        self._slots = asyncio.Semaphore(settings.concurrent_max)
        self._numbers = itertools.count(1)
        self._names: tuple[float, tuple[str, ...]] | None = None

    @property
    def configured(self) -> bool:
        return self._settings.models_dir is not None

    @property
    def default_model(self) -> str | None:
        """The first model folder by name."""
        return next(iter(self._known()), None)

    def owns(self, model: str) -> bool:
        return model in self._known()

    async def models(self, *, deadline: Deadline) -> list[ModelInfo]:
        """The folders with a `genai_config.json`; a broken one is logged and left out.

        Raises:
            InvalidSettings: `models_dir` is no folder that can be read.
        """
        models_dir = self._models_dir()
        names = await asyncio.to_thread(list_names, models_dir)
        found: list[ModelInfo] = []
        for name in names:
            try:
                folder = await asyncio.to_thread(read_folder, models_dir, name)
            except DataCorrupted as error:
                _log.warning("model_folder_broken", model=name, error=error.message)
                continue
            found.append(ModelInfo(id=name, provider=NAME, context_tokens=folder.context_tokens))
        return found

    async def complete(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> Completion:
        events = cast(AsyncGenerator[StreamEvent], self.stream(request, deadline=deadline))
        async with aclosing(events):
            async for event in events:
                if isinstance(event, StreamEnd):
                    return event.completion
        raise ProviderProtocol("onnx: the stream ended before the answer did")

    async def stream(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> AsyncIterator[StreamEvent]:
        """One answer.

        Raises:
            UnknownModel, DataCorrupted: there is no such folder, or it is broken.
            InvalidSettings: the library or `models_dir` is missing.
            InvalidInput: the request asks for what this model cannot do; names it.
            LimitExceeded: the prompt does not fit into the model's context.
            Unavailable: not enough memory to load it.
            ProviderFailed: the model's process died.
            DeadlineExceeded: no turn, no model or no answer in time.
        """
        check_tool_choice(request)
        deadline.check("a local model's answer")
        folder = await asyncio.to_thread(read_folder, self._models_dir(), request.model)
        command = _command(request, folder)
        async with self._generation(folder, command, deadline) as generation:
            reader = AnswerReader(request, call_ids=f"call_{next(self._numbers)}")
            reason: StopReason | None = None
            tokens = 0
            while reason is None:
                event = await _within(deadline, generation.next(), "the answer")
                tokens = int(event["tokens"])
                if event["event"] == "end":
                    events, reason = reader.finish(event["reason"])
                else:
                    events, reason = reader.feed(event["text"]), reader.stopped
                for written in events:
                    yield written
            usage = Usage(input_tokens=generation.input_tokens, output_tokens=tokens, cost_usd=None)
        check_structured(request, reader.parts, reason)
        yield StreamEnd(
            completion=Completion(
                model=request.model, provider=NAME, parts=reader.parts, stop_reason=reason, usage=usage
            )
        )

    async def close(self) -> None:
        """End the processes of all loaded models. The provider can be used again."""
        await self._shelf.close()

    @asynccontextmanager
    async def _generation(
        self, folder: ModelFolder, command: Json, deadline: Deadline
    ) -> AsyncGenerator[_Generation]:
        waiting = f"a turn ({self._settings.concurrent_max} answers at once)"
        await _within(deadline, self._slots.acquire(), waiting)
        try:
            loaded = await _within(
                deadline, self._shelf.take(folder.path), f"model {folder.name!r} to be loaded"
            )
        except BaseException:
            self._slots.release()
            raise

        def ended() -> None:
            self._shelf.give_back(loaded)
            self._slots.release()

        generation = _Generation(loaded.process, folder, command, ended)
        try:
            await _within(deadline, generation.started(), "the prompt to be read")
            yield generation
        finally:
            generation.stop()

    def _models_dir(self) -> Path:
        assert self._settings.models_dir is not None, "the gateway asks configured providers only"
        return self._settings.models_dir.expanduser()

    def _known(self) -> tuple[str, ...]:
        """Names of the model folders, looked at again after a moment: they are asked for at every call."""
        if self._settings.models_dir is None:
            return ()
        now_s = self._clock.monotonic_s()
        if self._names is None or now_s - self._names[0] >= NAMES_KNOWN_S:
            try:
                self._names = (now_s, tuple(list_names(self._models_dir())))
            except AgenticFlowError as error:
                _log.warning("models_unavailable", provider=NAME, error_code=error.code, error=error.message)
                self._names = (now_s, ())
        return self._names[1]


class _Generation:
    """One answer of a model's process, as its reader in the event loop sees it.

    `ended` is called once, when the process computes no more of it: that may be after the reader has left.
    """

    def __init__(
        self, process: ModelProcess, folder: ModelFolder, command: Json, ended: Callable[[], None]
    ) -> None:
        self._process = process
        self._folder = folder
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Json] = asyncio.Queue()  # bounded by the credit given to the process
        self._over = False
        self._read = 0
        self.input_tokens = 0
        self._key = process.generate({**command, "credit": QUEUE_MAX}, post_to(self._loop, self._take))

    def _take(self, event: Json) -> None:
        self._events.put_nowait(event)
        if event["event"] in ("end", "error", "died"):
            self._over = True
            self._ended()

    async def started(self) -> None:
        """Wait until the prompt was found to fit."""
        self.input_tokens = (await self.next())["input_tokens"]

    async def next(self) -> Json:
        """The next event: `started`, `text` or `end`; the others are raised."""
        event = await self._events.get()
        if event["event"] == "text":
            self._read += 1
            if self._read % (QUEUE_MAX // 2) == 0:
                self._process.more(self._key, QUEUE_MAX // 2)
        elif event["event"] in ("error", "died"):
            raise _error(event, self._folder)
        return event

    def stop(self) -> None:
        """The reader leaves. What is still computed ends after its token, or with the process."""
        if self._over:
            return
        self._process.cancel(self._key)
        self._loop.call_later(STOP_GRACE_S, _end_stuck, self._process, self._key)


def _end_stuck(process: ModelProcess, key: int) -> None:
    # It reads a long prompt for nobody. Loading anew is cheaper, unless others wait for this process.
    if process.runs(key) and process.generations == 1:
        process.kill()


def _error(event: Json, folder: ModelFolder) -> AgenticFlowError:
    if event["event"] == "died":
        return ProviderFailed(f"the process of model {folder.name!r} is gone: {event['message']}")
    message = event["message"]
    match event["kind"]:
        case "too_long":
            given, most = event["input_tokens"], event["context_tokens"]
            return LimitExceeded(
                f"the prompt has {given!r} tokens and the context of model {folder.name!r} holds {most!r}, "
                "the answer included",
                hint="shorten the conversation, or use a model with a longer context",
                details={"input_tokens": given, "context_tokens": most},
            )
        case "template":
            return InvalidInput(
                f"the chat template of model {folder.name!r} refuses these messages: {message}",
                hint="some templates have no system role, or want user and assistant to take turns",
                details={"field": "messages"},
            )
        case "schema":
            return InvalidInput(
                f"model {folder.name!r} cannot be held to this output_schema: {message}",
                hint="use fewer features of JSON Schema; docs/guides/onnx.md names the limits",
                details={"field": "output_schema"},
            )
        case "memory":
            return Unavailable(
                f"model {folder.name!r} ran out of memory: {message}",
                hint="lower output_tokens_max or gateway.onnx.concurrent_max, or shorten the prompt",
                details=OF_REQUEST,
            )
        case "broken":
            return DataCorrupted(
                f"the model in {str(folder.path)!r} cannot be run: {message}",
                hint="download the folder again, whole; its genai_config.json must fit its weights",
            )
        case _:
            return ProviderFailed(f"model {folder.name!r} failed: {message}")


def _command(request: CompletionRequest, folder: ModelFolder) -> Json:
    """The request as the process takes it.

    Raises:
        InvalidInput: it asks for what this model cannot do.
    """
    if folder.template is None:
        raise InvalidInput(
            f"model {folder.name!r} has no chat template, so it cannot be asked in messages",
            hint="use an instruct model, or put its template into the folder as chat_template.jinja",
            details={"field": "model"},
        )
    tools = request.tools if request.tool_choice != "none" else ()
    _check_asked(request, folder, bool(tools))
    offered = [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
        }
        for tool in tools
    ]
    messages = [turn for message in request.messages for turn in _turns(message, folder)]
    schema = request.output_schema
    if schema is not None and "x-guidance" not in schema:
        # White space is free in JSON, and a small model can write it for ever.
        schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    return {
        "messages": json.dumps(messages),
        "template": folder.template,
        "tools": json.dumps(offered) if offered else None,
        "schema": json.dumps(schema) if schema is not None else None,
        "search": _search(request, folder),
        "output_tokens_max": request.output_tokens_max,
        "context_tokens": folder.context_tokens,
    }


def _check_asked(request: CompletionRequest, folder: ModelFolder, tools: bool) -> None:
    if tools and not folder.tools:
        raise _cannot(folder, "tools", "its chat template offers none in a form that can be read back")
    if tools and request.tool_choice != "auto":
        raise _cannot(folder, "tool_choice", f"it cannot be held to {request.tool_choice!r}")
    if tools and request.output_schema is not None:
        raise _cannot(folder, "output_schema", "an answer that is held to a schema can call no tools")
    if request.reasoning_effort not in (None, "none"):
        raise _cannot(folder, "reasoning_effort", f"there is no {request.reasoning_effort!r} effort to set")
    if request.logprobs is not None:
        raise _cannot(folder, "logprobs", "its runtime tells no probabilities of tokens")
    if request.temperature is not None and not 0 <= request.temperature <= 100:
        raise _cannot(folder, "temperature", f"{request.temperature!r} is not between 0 and 100")
    if request.top_p is not None and not 0 <= request.top_p <= 1:
        raise _cannot(folder, "top_p", f"{request.top_p!r} is not between 0 and 1")


def _search(request: CompletionRequest, folder: ModelFolder) -> JsonObject:
    """Sampling, as asked; where nothing is asked, as the model's publisher set it."""
    search: JsonObject = {}
    if request.temperature == 0 or request.top_p == 0:
        search |= {"do_sample": False}
    elif request.temperature is not None or request.top_p is not None:
        # A top_k of 1, which many folders have, would make every sample the same, and so would no top_p.
        search |= {"do_sample": True, "top_k": folder.top_k if folder.top_k > 1 else 0}
        search["top_p"] = folder.top_p if request.top_p is None else request.top_p
        if request.temperature is not None:
            search["temperature"] = request.temperature
    if request.seed is not None:
        search["random_seed"] = request.seed & _SEED_MAX
    return search


def _turns(message: Message, folder: ModelFolder) -> list[JsonObject]:
    """A message in the form that chat templates take: results of tools in turns of their own."""
    texts: list[str] = []
    calls: list[JsonObject] = []
    results: list[JsonObject] = []
    for part in message.parts:
        match part:
            case TextPart():
                texts.append(_clean(part.text))
            case ThinkingPart() if message.role == "assistant":
                continue
            case ToolCallPart() if message.role == "assistant":
                function = {"name": part.name, "arguments": part.arguments}
                calls.append({"id": part.id, "type": "function", "function": function})
            case ToolResultPart() if message.role == "user":
                content = _clean(part.content)
                results.append(
                    {"role": "tool", "tool_call_id": part.id, "name": part.name, "content": content}
                )
            case ImagePart() if message.role == "user":
                raise _cannot(folder, "messages", "it cannot see images")
            case _:
                raise misplaced(part, message.role)
    if (calls or results) and not folder.tools:
        raise _cannot(folder, "messages", "its chat template has no place for tool calls and their results")
    turn: JsonObject = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        turn["tool_calls"] = calls
    return [*results, *([turn] if texts or calls or not results else [])]


def _clean(text: str) -> str:
    if "\0" in text:
        # The library ends a text there, and would answer half of the prompt.
        raise InvalidInput(
            "a text holds the character NUL, which local models cannot be given", hint="remove it"
        )
    return text


def _cannot(folder: ModelFolder, name: str, why: str) -> InvalidInput:
    return InvalidInput(
        f"model {folder.name!r} cannot be asked with this {name}: {why}",
        hint="leave it out, or use another model; docs/guides/onnx.md says what local models can do",
        details={"field": name},
    )


async def _within(deadline: Deadline, work: Coroutine[Any, Any, Got], what: str) -> Got:
    try:
        async with asyncio.timeout(deadline.remaining_s):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(
            f"no time was left to wait for {what}", hint="give the call longer (setting gateway.timeout_s)"
        ) from None


def onnx_provider(settings: GatewaySettings, transport: HttpTransport, shared: object = None) -> OnnxProvider:
    """Model folders on this machine; needs `gateway.onnx.models_dir`."""
    return OnnxProvider(settings.onnx)
