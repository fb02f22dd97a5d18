"""Model providers: the Protocol, the table of built-in ones, and those that speak HTTP.

A plug-in adds a provider through the entry-point group `agentic_flow.providers`: a function that takes
GatewaySettings and the HttpTransport of the gateway and returns a Provider. The built-in ones do the same.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import structlog

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    InvalidSettings,
    ProviderProtocol,
    ProviderRejected,
    UnknownModel,
)
from agentic_flow.core.messages import Completion, CompletionRequest, ModelInfo, StreamEvent
from agentic_flow.core.secrets import SecretSource, resolve
from agentic_flow.core.settings import GatewaySettings, ProviderSettings
from agentic_flow.gateway.exchange import Begun, Exchange, Exchanges
from agentic_flow.gateway.extractive import ExtractiveProvider
from agentic_flow.gateway.faults import error_from_answer
from agentic_flow.gateway.health import Health
from agentic_flow.gateway.keyring import KeyReport, KeyRing
from agentic_flow.gateway.models import ANTHROPIC_DEFAULT, OPENAI_DEFAULT, OPENROUTER_DEFAULT
from agentic_flow.gateway.onnx import onnx_provider
from agentic_flow.gateway.onward import Onward
from agentic_flow.gateway.transport import HttpAnswer, HttpTransport
from agentic_flow.gateway.wire.anthropic import API_VERSION, AnthropicFormat
from agentic_flow.gateway.wire.format import WireFormat, WireRequest, items, load_object, text_of
from agentic_flow.gateway.wire.openai import COMPATIBLE, OPENAI, OPENROUTER, OpenAIFormat, OpenAIPassing
from agentic_flow.gateway.wire.passing import Glance, PassingReader, PassingRequest
from agentic_flow.gateway.wire.responses_passing import reader_of

_log = structlog.get_logger(__name__)

PLUGIN_GROUP = "agentic_flow.providers"
MODELS_LISTED_MAX = 2000
MODEL_LIST = "(list)"
"""What keys' rests call the list of models, which is no model."""
_ERROR_BODY_MAX_BYTES = 64 * 1024
_EVENT_STREAM = "text/event-stream"
_JSON = "application/json"
_PASSING_WHOLE = {"content-type": _JSON, "accept": _JSON}
_ENCODED = "encoded"
_CHAT_PATH = "/chat/completions"
_OPENAI_NAMES = re.compile(r"(gpt-|chatgpt-|o\d|text-embedding-)")


class Provider(Protocol):
    """One way to have models answer. It makes one try; the gateway around it retries."""

    @property
    def name(self) -> str: ...

    @property
    def default_model(self) -> str | None:
        """The model for `name:` alone; None when the provider must be asked for its list."""
        ...

    @property
    def configured(self) -> bool:
        """Whether it can be asked now: it has its key, or needs none."""
        ...

    @property
    def setup_hint(self) -> str:
        """What to set so that it can be asked."""
        ...

    def owns(self, model: str) -> bool:
        """Whether a bare model name, without a provider in front, is one of its own."""
        ...

    async def models(self, *, deadline: Deadline) -> list[ModelInfo]:
        """What it serves, in its own order."""
        ...

    async def complete(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> Completion:
        """One try. `request.model` is the provider's own id; the gateway prices a `cost_usd` of None."""
        ...

    def stream(
        self, request: CompletionRequest, *, deadline: Deadline, idempotency_key: str | None = None
    ) -> AsyncIterator[StreamEvent]:
        """One try over the streaming wire format; the last event is StreamEnd, or an error is raised."""
        ...


ProviderFactory = Callable[[GatewaySettings, HttpTransport], Provider]
StoredSecrets = Callable[[str], SecretSource]
"""The source of a secret of the encrypted store, by the name of its setting."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What the built-in providers of a gateway have in common, beside the transport.

    Args:
        health: Circuit breakers.
        stored: Where keys come from when no setting gives any.
    """

    health: Health
    stored: StoredSecrets | None = None

    def keys(self, provider: str, section: ProviderSettings) -> KeyRing:
        """The keys of a provider."""
        setting = f"gateway.{provider}.api_key"
        fallback = self.stored(setting) if self.stored is not None else None
        return KeyRing(
            resolve(section.api_key, section.api_key_file, fallback),
            provider=provider,
            setting=setting,
            clock=self.health.clock,
            on_removed=lambda key_id: self.health.forget(provider, key_id),
        )


class BuiltInFactory(Protocol):
    """A ProviderFactory that can be given what its neighbours use too."""

    def __call__(
        self, settings: GatewaySettings, transport: HttpTransport, shared: Shared | None = None
    ) -> Provider: ...


@dataclass(frozen=True, slots=True)
class HttpProfile:
    """What sets one HTTP provider apart.

    Args:
        name: Provider name.
        variable: Prefix of its environment variables (`ANTHROPIC` for `ANTHROPIC_API_KEY`).
        wire: Its wire format.
        default_model: See Provider.
        key_required: False for endpoints that may have no key.
        owns: See Provider.
        version_prefix: Path in front of `/models`, where the wire format's own path already carries it.
        responses: Whether it also speaks OpenAI Responses, which then pass through to it.
    """

    name: str
    variable: str
    wire: WireFormat
    default_model: str | None
    key_required: bool
    owns: Callable[[str], bool]
    version_prefix: str = ""
    responses: bool = False


class HttpProvider:
    """A provider behind an HTTP API.

    Args:
        profile: What sets it apart.
        base_url: Root of its API.
        keys: Its keys.
        health: The circuit breakers of the gateway.
        transport: Carries the requests.
    """

    def __init__(
        self, profile: HttpProfile, *, base_url: str, keys: KeyRing, health: Health, transport: HttpTransport
    ) -> None:
        self._profile = profile
        self._wire = profile.wire
        self._base_url = base_url.rstrip("/")
        self._keys = keys
        self._clock = health.clock
        self._exchanges = Exchanges(
            profile.name, self._base_url, keys=keys, health=health, transport=transport
        )

    @property
    def name(self) -> str:
        return self._profile.name

    @property
    def base_url(self) -> str:
        return self._base_url

    @property
    def default_model(self) -> str | None:
        return self._profile.default_model

    @property
    def configured(self) -> bool:
        if not self._profile.key_required:
            return True
        try:
            return self._keys.present
        except InvalidSettings:
            return True  # it was set up; asking it says what is wrong with its key file

    @property
    def setup_hint(self) -> str:
        variable = self._profile.variable
        if self.name == "openai":
            return f"set {variable}_API_KEY, or {variable}_BASE_URL for an endpoint without a key"
        return f"set {variable}_API_KEY or gateway.{self.name}.api_key_file"

    def owns(self, model: str) -> bool:
        return self._profile.owns(model)

    def keys_health(self) -> list[KeyReport]:
        """The state of each key, for metrics."""
        return self._keys.reports()

    async def models(self, *, deadline: Deadline) -> list[ModelInfo]:
        path = f"{self._profile.version_prefix}/models"
        if self._profile.version_prefix:
            path += "?limit=1000"  # Anthropic's largest page; it serves far fewer models
        async with self._exchanges.open(
            "GET",
            path,
            model=MODEL_LIST,
            headers=lambda key: self._headers(key, None, {}),
            refusal=lambda answer, key: self._refusal(answer, "", key),
            body=None,
            deadline=deadline,
            streamed=True,
            aside=True,
        ) as exchange:
            body = await exchange.answer.read()
            listed = items(load_object(body, f"the model list of {self.name}").get("data"))
        found: list[ModelInfo] = []
        for entry in listed[:MODELS_LISTED_MAX]:
            model_id = text_of(entry.get("id"))
            context = (
                entry.get("context_length") or entry.get("max_input_tokens") or entry.get("max_model_len")
            )
            if model_id:
                found.append(
                    ModelInfo(
                        id=model_id,
                        provider=self.name,
                        context_tokens=context if isinstance(context, int) else None,
                    )
                )
        return found

    async def complete(
        self,
        request: CompletionRequest,
        *,
        deadline: Deadline,
        idempotency_key: str | None = None,
        begun: Begun | None = None,
    ) -> Completion:
        """See `Provider`. `begun`: what `begin` began for this very request."""
        sent = self._wire.encode(request, stream=False)
        async with self._asked(
            request, sent, deadline, idempotency_key, streamed=False, begun=begun
        ) as exchange:
            body = await exchange.answer.read()
            self._check_body(exchange.answer, body)
            decoded = self._wire.decode(request, body)
        return self._settled(decoded.completion, decoded.usage_estimated)

    async def stream(
        self,
        request: CompletionRequest,
        *,
        deadline: Deadline,
        idempotency_key: str | None = None,
        onward: Onward | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """See `Provider`. Once `onward` is open, lists of events go there instead, all but the end."""
        sent = self._wire.encode(request, stream=True)
        decoder = self._wire.decoder(request)
        async with self._asked(request, sent, deadline, idempotency_key, streamed=True) as exchange:
            answer = exchange.answer
            if answer.content_type != _EVENT_STREAM:
                self._check_type(answer, _EVENT_STREAM, await answer.read())

            def forward(chunk: bytes) -> bool:
                assert onward is not None
                if events := decoder.feed(chunk):
                    if not exchange.begun:
                        exchange.begin()
                    onward.give(events)
                return not decoder.done and not onward.full

            while not decoder.done:
                if onward is not None and onward.is_open:
                    await answer.forward(forward)
                    if onward.full:
                        await onward.drained()
                    elif not decoder.done:
                        break  # all is there that will come
                    continue
                chunk = await answer.chunk()
                if not chunk:
                    break
                for event in decoder.feed(chunk):
                    exchange.begin()
                    yield event
            end = decoder.end()
            await answer.settle()
        yield end.model_copy(update={"completion": self._settled(end.completion, decoder.usage_estimated)})

    def _asked(
        self,
        request: CompletionRequest,
        sent: WireRequest,
        deadline: Deadline,
        idempotency_key: str | None,
        *,
        streamed: bool,
        begun: Begun | None = None,
    ) -> AbstractAsyncContextManager[Exchange]:
        headers = {**sent.headers, "accept": _EVENT_STREAM} if streamed else sent.headers
        return self._exchanges.open(
            "POST",
            sent.path,
            model=request.model,
            headers=lambda key: self._headers(key, idempotency_key, headers),
            refusal=lambda answer, key: self._refusal(answer, request.model, key),
            body=sent.body,
            deadline=deadline,
            streamed=streamed,
            begun=begun,
        )

    # At once: without waiting for anything

    def begin(self, sent: WireRequest, model: str, deadline: Deadline) -> Begun | None:
        """Ask what `encode` wrote; None: no connection is there. Raises as `Exchanges.begin`."""
        headers = sent.headers
        return self._exchanges.begin(
            sent.path,
            model=model,
            headers=lambda key: self._headers(key, None, headers),
            named=(_ENCODED, *headers, *headers.values()),
            body=sent.body,
            deadline=deadline,
        )

    def begin_passing(self, sent: PassingRequest, model: str, deadline: Deadline) -> Begun | None:
        """The same of a request that passes through."""
        headers = sent.headers
        return self._exchanges.begin(
            sent.path,
            model=model,
            headers=lambda key: self._headers(key, None, _PASSING_WHOLE, headers),
            named=(*headers, *headers.values()),
            body=sent.body,
            deadline=deadline,
        )

    def encode(self, request: CompletionRequest) -> WireRequest:
        """A request for a whole answer as this provider reads it.

        Raises:
            InvalidInput: its format cannot say this.
        """
        return self._wire.encode(request, stream=False)

    def decode(self, request: CompletionRequest, body: bytes) -> Completion:
        """The whole answer in a body. Raises as `complete`."""
        decoded = self._wire.decode(request, body)
        return self._settled(decoded.completion, decoded.usage_estimated)

    def glance(self, sent: PassingRequest, body: bytes) -> Glance | None:
        """What `reader` would read in a whole answer, if both are ordinary ones; None: it must."""
        wire = self._wire
        return wire.glance(body) if isinstance(wire, OpenAIFormat) and sent.path == _CHAT_PATH else None

    def read_answer(self, reader: PassingReader, body: bytes) -> None:
        """Have a reader read a whole answer.

        Raises:
            ProviderError: it is none.
        """
        reader.take_answer(load_object(body, f"the answer of {self.name}"))

    # Passing through: the caller speaks this provider's own format

    @property
    def wire_name(self) -> str:
        """The format that this provider speaks."""
        return self._wire.name

    @property
    def passes(self) -> frozenset[str]:
        """The formats in which callers' requests pass through to it: its own, and those beside it."""
        beside = {"embeddings"} if self._wire.name == "openai" else set[str]()
        return frozenset({self._wire.name, *beside, *(["responses"] if self._profile.responses else [])})

    def reader(self, sent: PassingRequest) -> PassingReader:
        """What reads the answer to `sent` while it passes."""
        own = reader_of(sent.path, self.name, sent.sent)
        if own is not None:
            return own
        reader = self._wire.passing(sent.sent)
        if sent.hides_usage and isinstance(reader, OpenAIPassing):
            reader.hides_usage = True
        return reader

    async def pass_whole(
        self,
        sent: PassingRequest,
        *,
        deadline: Deadline,
        idempotency_key: str | None = None,
        reader: PassingReader | None = None,
        model: str | None = None,
        begun: Begun | None = None,
    ) -> bytes:
        """One try, as the caller wrote it: the body of the answer, untouched.

        Args:
            sent: The request.
            deadline: Of the try.
            idempotency_key: Passed on.
            reader: Reads the answer as well, so that one which is none counts as the provider's failure.
            model: The provider's own id of the model, by which health is kept. None: what `sent` names.
            begun: What `begin_passing` began for this very request.

        Raises:
            ProviderError: as `complete`; what the provider says of a request that it refuses is in
                `details["answer_body"]`.
        """
        async with self._passing(
            sent, model, deadline, idempotency_key, streamed=False, begun=begun
        ) as exchange:
            body = await exchange.answer.read()
            self._check_body(exchange.answer, body)
            if reader is not None:
                self.read_answer(reader, body)
        return body

    async def pass_stream(
        self,
        sent: PassingRequest,
        reader: PassingReader,
        *,
        deadline: Deadline,
        idempotency_key: str | None = None,
        model: str | None = None,
        onward: Onward | None = None,
    ) -> AsyncGenerator[bytes]:
        """One try, streamed: whole events as they come, untouched.

        The provider's own error event is passed on like any other; `reader.error` then holds it. `model` as
        in `pass_whole`. Once `onward` is open, events go there instead.

        Raises:
            ProviderError: as `stream`; also after events were given, when the stream breaks.
        """
        rest = b""
        async with self._passing(sent, model, deadline, idempotency_key, streamed=True) as exchange:
            answer = exchange.answer
            if answer.content_type != _EVENT_STREAM:
                self._check_type(answer, _EVENT_STREAM, await answer.read())
            events = b""

            def read(chunk: bytes) -> bool:
                """Whether these bytes are whole events within the answer, which go on."""
                nonlocal events
                events = reader.feed(chunk)
                if reader.error is not None:
                    return False
                if events and reader.model:  # a comment that keeps the connection alive is no answer
                    exchange.begin()
                return bool(events)

            def forward(chunk: bytes) -> bool:
                nonlocal events
                assert onward is not None
                if not exchange.begun:
                    if read(chunk):
                        onward.give(events)
                else:  # the same in fewer calls, as for all pieces but the first
                    events = reader.feed(chunk)
                    if events and reader.error is None:
                        onward.give(events)
                return reader.error is None and not reader.done and not onward.full

            while not reader.done:
                if onward is not None and onward.is_open:
                    await answer.forward(forward)
                    if onward.full:
                        await onward.drained()
                    elif reader.error is None and not reader.done:
                        break  # all is there that will come
                elif not (chunk := await answer.chunk()):
                    break
                elif read(chunk):
                    yield events
                if reader.error is not None:
                    exchange.broke(reader.error)
                    yield events
                    return
            if reader.done:
                await answer.settle()
            else:
                rest = reader.finish()
        if rest:
            yield rest

    def _passing(
        self,
        sent: PassingRequest,
        model: str | None,
        deadline: Deadline,
        idempotency_key: str | None,
        *,
        streamed: bool,
        begun: Begun | None = None,
    ) -> AbstractAsyncContextManager[Exchange]:
        asked = model or text_of(sent.sent.get("model"))
        first = {"content-type": _JSON, "accept": _EVENT_STREAM if sent.stream else _JSON}
        return self._exchanges.open(
            "POST",
            sent.path,
            model=asked,
            headers=lambda key: self._headers(key, idempotency_key, first, sent.headers),
            refusal=lambda answer, key: self._refusal(answer, asked, key, quoted=True),
            body=sent.body,
            deadline=deadline,
            streamed=streamed,
            # Counting tokens is another service of the provider's: that it works says nothing of the model.
            aside=sent.path.partition("?")[0].endswith("/count_tokens"),
            begun=begun,
        )

    def _settled(self, completion: Completion, usage_estimated: bool) -> Completion:
        if usage_estimated:
            log_estimate(self.name, completion)
        return completion.model_copy(update={"provider": self.name})

    def _headers(
        self,
        key: str | None,
        idempotency_key: str | None,
        first: Mapping[str, str],
        last: Mapping[str, str] | None = None,
    ) -> dict[str, str]:
        """All headers of a request; `last` wins over ours, ours win over `first`."""
        headers = dict(first)
        if key:
            headers.update(self._wire.auth_headers(key))
        if self._profile.version_prefix:
            headers["anthropic-version"] = API_VERSION
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        if last:
            headers.update(last)
        return headers

    def _check_body(self, answer: HttpAnswer, body: bytes) -> None:
        if not body:
            raise ProviderProtocol(f"{self.name} sent an empty answer", hint="the call can be repeated")
        self._check_type(answer, _JSON, body)

    def _check_type(self, answer: HttpAnswer, wanted: str, body: bytes) -> None:
        if answer.content_type == wanted or (wanted == _JSON and answer.content_type.endswith("+json")):
            return
        fault = self._wire.fault(body)
        shown = fault.message if fault else body[:120].decode("utf-8", "replace")
        raise ProviderProtocol(
            f"{self.name} answered with content type {answer.content_type!r}, not {wanted!r}: {shown!r}",
            hint=f"check {self._profile.variable}_BASE_URL: does its API answer there?",
            details={"provider": self.name, "last_status": answer.status},
        )

    async def _refusal(
        self, answer: HttpAnswer, model: str, key: str | None, *, quoted: bool = False
    ) -> AgenticFlowError:
        body = b""
        while len(body) <= _ERROR_BODY_MAX_BYTES and (chunk := await answer.chunk()):
            body += chunk
        variable, setting = self._profile.variable, f"gateway.{self.name}"
        error = error_from_answer(
            self.name,
            model,
            answer.status,
            answer.headers,
            self._wire.fault(body),
            key_hint=f"{variable}_API_KEY (setting {setting}.api_key or {setting}.api_key_file)",
            base_url_hint=f"{variable}_BASE_URL (setting {setting}.base_url, now {self._base_url!r})",
            now_s=self._clock.time_s(),
            secret=key,
        )
        if quoted and isinstance(error, ProviderRejected | UnknownModel):
            text = body[:_ERROR_BODY_MAX_BYTES].decode("utf-8", "replace")
            error.details["answer_body"] = text.replace(key, "…") if key else text
        return error


def log_estimate(provider: str, completion: Completion) -> None:
    """Say that the tokens of an answer were estimated, because its provider counted none."""
    _log.warning(
        "usage_estimated",
        provider=provider,
        model=completion.model,
        input_tokens=completion.usage.input_tokens,
        output_tokens=completion.usage.output_tokens,
    )


def anthropic_provider(
    settings: GatewaySettings, transport: HttpTransport, shared: Shared | None = None
) -> Provider:
    """Anthropic by its Messages API."""
    section = settings.anthropic
    profile = HttpProfile(
        name="anthropic",
        variable="ANTHROPIC",
        wire=AnthropicFormat(),
        default_model=ANTHROPIC_DEFAULT,
        key_required=True,
        owns=lambda model: model.startswith("claude"),
        version_prefix="/v1",
    )
    # The vendor's variable has no version in it; people write one anyway.
    base_url = section.base_url.rstrip("/").removesuffix("/v1")
    return _made(profile, section, base_url, settings, transport, shared)


def openrouter_provider(
    settings: GatewaySettings, transport: HttpTransport, shared: Shared | None = None
) -> Provider:
    """OpenRouter by Chat Completions; its model names contain a slash."""
    section = settings.openrouter
    profile = HttpProfile(
        name="openrouter",
        variable="OPENROUTER",
        wire=OpenAIFormat(OPENROUTER, provider="openrouter"),
        default_model=OPENROUTER_DEFAULT,
        key_required=True,
        owns=lambda model: "/" in model,
    )
    return _made(profile, section, section.base_url, settings, transport, shared)


def openai_provider(
    settings: GatewaySettings, transport: HttpTransport, shared: Shared | None = None
) -> Provider:
    """OpenAI, or any endpoint that speaks its Chat Completions.

    An endpoint other than OpenAI's may need no key, and owns every name that no other provider claims,
    because only it knows what it serves.
    """
    section = settings.openai
    official = section.base_url.rstrip("/") == GatewaySettings().openai.base_url
    profile = HttpProfile(
        name="openai",
        variable="OPENAI",
        wire=OpenAIFormat(OPENAI if official else COMPATIBLE),
        default_model=OPENAI_DEFAULT if official else None,
        key_required=official,
        owns=lambda model: bool(_OPENAI_NAMES.match(model)) if official else not model.startswith("claude"),
        responses=official,
    )
    return _made(profile, section, section.base_url, settings, transport, shared)


def extractive_provider(
    settings: GatewaySettings, transport: HttpTransport, shared: Shared | None = None
) -> Provider:
    """The built-in model that selects and cites; it needs no key and no network."""
    return ExtractiveProvider()


# Order is the order of preference where a bare name could mean several.
BUILT_IN: dict[str, BuiltInFactory] = {
    "onnx": onnx_provider,  # first: it owns the exact names of folders, the others whole patterns
    "anthropic": anthropic_provider,
    "openrouter": openrouter_provider,
    "openai": openai_provider,
    "extractive": extractive_provider,
}


def build_providers(
    settings: GatewaySettings,
    transport: HttpTransport,
    extra: Mapping[str, ProviderFactory] | None = None,
    *,
    health: Health | None = None,
    stored: StoredSecrets | None = None,
) -> dict[str, Provider]:
    """Every provider by name; one of `extra` may replace a built-in of the same name.

    Args:
        settings: The section `gateway`.
        transport: Carries the requests.
        extra: Factories of plug-ins.
        health: Circuit breakers, shared by all of them. None makes them from the settings.
        stored: The encrypted store, asked again while it runs for keys that no setting gives.
    """
    shared = Shared(health or Health.of(settings), stored)
    extra = extra or {}
    made = {name: make(settings, transport, shared) for name, make in BUILT_IN.items() if name not in extra}
    made |= {name: make(settings, transport) for name, make in extra.items()}
    return {name: made[name] for name in (*BUILT_IN, *(name for name in made if name not in BUILT_IN))}


def _made(
    profile: HttpProfile,
    section: ProviderSettings,
    base_url: str,
    settings: GatewaySettings,
    transport: HttpTransport,
    shared: Shared | None,
) -> HttpProvider:
    shared = shared or Shared(Health.of(settings))
    keys = shared.keys(profile.name, section)
    return HttpProvider(profile, base_url=base_url, keys=keys, health=shared.health, transport=transport)
