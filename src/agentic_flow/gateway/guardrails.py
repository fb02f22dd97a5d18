"""What looks at requests before they go to a model, and at answers before they go back.

Plug-ins (entry-point group `agentic_flow.guardrails`, `(options) -> Guardrail`); the built-in ones are made
the same way and may be replaced by name:

    max-size       bounds of characters, messages, images, tools and output tokens
    deny-patterns  regular expressions that a request must not match, in linear time
    secrets        no credentials in requests

A guardrail refuses by raising PolicyDenied. One that breaks or takes too long refuses too: what it would have
said is unknown. After a streamed answer it is too late to refuse, so there a refusal is logged and counted.
Redaction of logs is no guardrail but always on: `redact_event`.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, NamedTuple, Protocol, cast

import orjson
import structlog
from pydantic import Field, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from agentic_flow.core.errors import OF_REQUEST, AgenticFlowError, InvalidInput, PolicyDenied, Unavailable
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    Frozen,
    ImagePart,
    JsonObject,
    Part,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolResultPart,
)
from agentic_flow.core.redaction import SECRET_KINDS, find, looks_random, redact, redact_event
from agentic_flow.gateway.policies import Caller, GuardrailRule

__all__ = [
    "BUILT_IN",
    "CompiledGuardrails",
    "GuardedAnswer",
    "GuardedRequest",
    "Guardrail",
    "GuardrailFactory",
    "Guardrails",
    "Sizes",
    "redact",
    "redact_event",
]

_log = structlog.get_logger(__name__)

TIMEOUT_S = 10.0
"""The most that one guardrail may take for a request or an answer."""
# Strings under these keys are no text that a model reads or writes.
_LABELS = frozenset({"role", "type", "id", "model", "tool_call_id", "tool_use_id", "call_id", "signature"})
_IMAGE_KINDS = frozenset({"image", "image_url", "input_image"})
_OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


class Sizes(NamedTuple):
    """How large a request is. `output_tokens` is the limit that it names; None: it names none."""

    characters: int
    messages: int
    images: int
    tools: int
    output_tokens: int | None


class GuardedRequest:
    """A request as guardrails see it; texts and sizes are found when first asked for.

    Args:
        caller: Who asks.
        model: The model that was asked for.
        sent: Our own request, or a body in a vendor's format.
    """

    def __init__(self, caller: Caller, model: str, sent: CompletionRequest | JsonObject) -> None:
        self.caller = caller
        self.model = model
        self.sent = sent

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All texts in their order: messages, system, tool definitions, arguments and results."""
        return self._content[0]

    @cached_property
    def text(self) -> str:
        """All texts, joined by new lines."""
        return "\n".join(self.texts)

    @cached_property
    def sizes(self) -> Sizes:
        """Counted, not estimated; images are those within messages."""
        characters, images = sum(map(len, self.texts)), self._content[1]
        if isinstance(self.sent, CompletionRequest):
            request = self.sent
            return Sizes(
                characters, len(request.messages), images, len(request.tools), request.output_tokens_max
            )
        sent = self.sent
        turns: object = sent.get("messages", sent.get("input"))
        messages = len(cast(list[object], turns)) if isinstance(turns, list) else int(turns is not None)
        tools = sum(
            len(cast(list[object], offered))
            for offered in (sent.get("tools"), sent.get("functions"))
            if isinstance(offered, list)
        )
        output = next((sent[name] for name in _OUTPUT_LIMITS if isinstance(sent.get(name), int)), None)
        return Sizes(characters, messages, images, tools, output)

    @cached_property
    def _content(self) -> tuple[tuple[str, ...], int]:
        if not isinstance(self.sent, CompletionRequest):
            return _body_texts(self.sent)
        request = self.sent
        texts: list[str] = []
        images = 0
        for message in request.messages:
            texts += _part_texts(message.parts)
            images += sum(isinstance(part, ImagePart) for part in message.parts)
        for tool in request.tools:
            texts += (tool.name, tool.description, *_body_texts(tool.input_schema)[0])
        if request.output_schema is not None:
            texts += _body_texts(request.output_schema)[0]
        return (*texts, *request.stop), images


class GuardedAnswer:
    """An answer as guardrails see it.

    Args:
        caller: Who asked.
        model: The model that answered.
        answer: A completion, a body in a vendor's format, or the text of a stream.
        streamed: It went out already: a refusal is only noted.
    """

    def __init__(
        self, caller: Caller, model: str, answer: Completion | JsonObject | str, *, streamed: bool = False
    ) -> None:
        self.caller = caller
        self.model = model
        self.answer = answer
        self.streamed = streamed

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """All texts of the answer, tool arguments included."""
        if isinstance(self.answer, str):
            return (self.answer,)
        if isinstance(self.answer, Completion):
            return tuple(_part_texts(self.answer.parts))
        return _body_texts(self.answer)[0]

    @cached_property
    def text(self) -> str:
        """All texts, joined by new lines."""
        return "\n".join(self.texts)


class Guardrail(Protocol):
    """Looks at requests and answers; says no by raising PolicyDenied, whose hint says what to change."""

    @property
    def name(self) -> str: ...

    async def before(self, request: GuardedRequest) -> None:
        """Raises PolicyDenied when the request must not go to the model."""
        ...

    async def after(self, answer: GuardedAnswer) -> None:
        """Raises PolicyDenied when the answer must not go to the caller."""
        ...


GuardrailFactory = Callable[[Mapping[str, Any]], Guardrail]
"""Makes a guardrail of the options in its rule; raises InvalidInput, or pydantic's error, for wrong ones."""


class CompiledGuardrails:
    """The guardrails in force, in the order of their rules."""

    def __init__(
        self, guardrails: Sequence[tuple[str | None, Guardrail]], late: Counter[str], timeout_s: float
    ) -> None:
        self._guardrails = tuple(guardrails)
        self._late = late
        self._timeout_s = timeout_s
        self.empty = not self._guardrails
        """Whether there is nothing to do; spares making what guardrails look at."""

    async def before(self, request: GuardedRequest) -> None:
        """Ask every guardrail of the caller's tenant.

        Raises:
            PolicyDenied: one refuses; `details["guardrail"]` names it.
            Unavailable: one took too long.
            AgenticFlowError: one is broken.
        """
        for tenant, guardrail in self._guardrails:
            if tenant is None or tenant == request.caller.tenant:
                await _ask(guardrail, guardrail.before(request), self._timeout_s)

    async def after(self, answer: GuardedAnswer) -> None:
        """As `before`, about an answer; of one that was streamed a refusal is logged and counted."""
        for tenant, guardrail in self._guardrails:
            if tenant is not None and tenant != answer.caller.tenant:
                continue
            try:
                await _ask(guardrail, guardrail.after(answer), self._timeout_s)
            except AgenticFlowError as error:
                if not answer.streamed:
                    raise
                self._late[guardrail.name] += 1
                _log.warning(
                    "guardrail_objected_late",
                    guardrail=guardrail.name,
                    code=error.code,
                    tenant=answer.caller.tenant,
                    model=answer.model,
                )


class Guardrails:
    """Makes guardrails of rules.

    Args:
        extra: Factories by name, added to the built-in ones (plug-ins).
        timeout_s: The most that one guardrail may take for a request or an answer.
    """

    def __init__(
        self, extra: Mapping[str, GuardrailFactory] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._timeout_s = timeout_s
        self._factories: dict[str, GuardrailFactory] = {**BUILT_IN, **(extra or {})}
        self.late: Counter[str] = Counter()
        """Objections to streamed answers, by guardrail."""

    def compile(self, rules: Sequence[GuardrailRule]) -> CompiledGuardrails:
        """The guardrails of these rules, ready for use.

        Raises:
            InvalidInput: a name is unknown, or options are wrong; says which.
        """
        return CompiledGuardrails(
            [(rule.tenant, self._make(rule)) for rule in rules], self.late, self._timeout_s
        )

    def _make(self, rule: GuardrailRule) -> Guardrail:
        factory = self._factories.get(rule.name)
        if factory is None:
            raise InvalidInput(
                f"there is no guardrail {rule.name!r}", hint=f"known: {', '.join(sorted(self._factories))}"
            )
        try:
            return factory(rule.options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InvalidInput(
                f"the option {field!r} of the guardrail {rule.name!r} is refused: {first['msg']}"
                if field
                else f"the options of the guardrail {rule.name!r} are refused: {first['msg']}",
                hint="correct it in the policies",
            ) from None


async def _ask(guardrail: Guardrail, question: Any, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await question
    except PolicyDenied as error:
        # Vendors' clients show the message and nothing else.
        error.details.setdefault("guardrail", guardrail.name)
        error.message = f"the guardrail {guardrail.name!r} refuses: {error.message}"
        raise
    except AgenticFlowError:
        raise
    except TimeoutError:
        raise Unavailable(
            f"the guardrail {guardrail.name!r} did not decide within {timeout_s!r} s",
            hint="try again; if it stays so, tell the operator",
            details=OF_REQUEST,
        ) from None
    except Exception as error:  # a stranger's code may raise anything
        _log.exception("guardrail_failed", guardrail=guardrail.name)
        raise AgenticFlowError(
            f"the guardrail {guardrail.name!r} failed, so nothing goes past it",
            hint="tell the operator; the server's log has the cause",
        ) from error


# Built in


class _MaxSizeOptions(Frozen):
    characters_max: Annotated[int, Field(ge=1)] | None = None
    messages_max: Annotated[int, Field(ge=1)] | None = None
    images_max: Annotated[int, Field(ge=0)] | None = None
    tools_max: Annotated[int, Field(ge=0)] | None = None
    output_tokens_max: Annotated[int, Field(ge=1)] | None = None


class MaxSize:
    """Refuses requests beyond any of its bounds. Where output is bounded, a request must name its limit."""

    name = "max-size"

    def __init__(self, options: Mapping[str, Any]) -> None:
        bounds = _MaxSizeOptions.model_validate(dict(options)).model_dump(exclude_none=True)
        if not bounds:
            raise InvalidInput(
                "the guardrail 'max-size' has no bounds",
                hint=f"give one of {', '.join(_MaxSizeOptions.model_fields)}",
            )
        self._bounds = {name.removesuffix("_max"): most for name, most in bounds.items()}

    async def before(self, request: GuardedRequest) -> None:
        sizes = request.sizes
        for what, most in self._bounds.items():
            size: int | None = getattr(sizes, what)
            shown = what.replace("_", " ")
            if size is None:
                raise PolicyDenied(
                    f"the request names no limit of its {shown}, and at most {most!r} are allowed",
                    hint=f"set max_tokens to {most!r} or less",
                )
            if size > most:
                raise PolicyDenied(
                    f"the request has {size!r} {shown}, and at most {most!r} are allowed",
                    hint="ask for less" if what == "output_tokens" else "send less, or in several requests",
                )

    async def after(self, answer: GuardedAnswer) -> None:
        """Answers are bounded by what was asked for."""


_PATTERN_MAX_CHARS = 1000
_REPEATS_MAX = 1000
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")


class _DenyPatternsOptions(Frozen):
    patterns: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=_PATTERN_MAX_CHARS)], ...],
        Field(min_length=1, max_length=100),
    ]
    ignore_case: bool = True
    answers: bool = False


class DenyPatterns:
    """Refuses requests, and if asked answers, in which a pattern occurs.

    Patterns are those of Rust's `regex`, which pydantic carries: no look-around and no references back, in
    exchange for a time that grows with the length of the text only, so that no request can hang the gateway.
    Counted repeats multiply a pattern's size, so together they are bounded.
    """

    name = "deny-patterns"

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = _DenyPatternsOptions.model_validate(dict(options))
        self._answers = chosen.answers
        flag = "(?i)" if chosen.ignore_case else ""
        self._patterns = [(pattern, _linear(pattern, flag)) for pattern in chosen.patterns]

    async def before(self, request: GuardedRequest) -> None:
        self._check(request.text, "request")

    async def after(self, answer: GuardedAnswer) -> None:
        if self._answers:
            self._check(answer.text, "answer")

    def _check(self, text: str, what: str) -> None:
        for pattern, validator in self._patterns:
            if validator.isinstance_python(text):
                raise PolicyDenied(
                    f"the {what} matches {pattern!r}, which is not allowed here",
                    hint="leave it out" if what == "request" else "ask for something else",
                )


def _linear(pattern: str, flag: str) -> SchemaValidator:
    repeats = 1
    for least, most in _REPEAT.findall(pattern):
        repeats *= max(1, int(least or 1), int(most or 1))
    if repeats > _REPEATS_MAX:
        raise InvalidInput(
            f"the counted repeats of the pattern {pattern!r} multiply to {repeats!r}",
            hint=f"keep their product at or below {_REPEATS_MAX!r}; `*` and `+` cost less",
        )
    try:
        return SchemaValidator(core_schema.str_schema(pattern=flag + pattern, regex_engine="rust-regex"))
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1].removeprefix("error: ")
        raise InvalidInput(
            f"the pattern {pattern!r} is refused: {reason}",
            hint="see docs.rs/regex for the syntax: no look-around, no references back",
        ) from None


_SLICE_CHARS = 32_768
# A credential that one slice cuts off is whole in the next; only its beginning is needed of a longer one.
_OVERLAP_CHARS = 1024


class _SecretsOptions(Frozen):
    answers: bool = False


class Secrets:
    """Refuses requests, and if asked answers, with what looks like a credential.

    Keys of known vendors, private keys, tokens, and values assigned to names such as `password`. Placeholders
    (`sk-xxxx…`, `…EXAMPLE`) have too little entropy and pass.
    """

    name = "secrets"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._answers = _SecretsOptions.model_validate(dict(options)).answers

    async def before(self, request: GuardedRequest) -> None:
        await self._check(request.texts, "request")

    async def after(self, answer: GuardedAnswer) -> None:
        if self._answers:
            await self._check(answer.texts, "answer")

    async def _check(self, texts: Sequence[str], what: str) -> None:
        for text in texts:
            for at in range(0, len(text), _SLICE_CHARS):
                if at:
                    await asyncio.sleep(0)  # others get their turn: a megabyte takes some .3 s
                self._check_slice(text[max(0, at - _OVERLAP_CHARS) : at + _SLICE_CHARS], what)

    def _check_slice(self, text: str, what: str) -> None:
        for kind, start, end in find(text):
            certain = kind in ("private key", "basic")
            if kind in SECRET_KINDS and (certain or looks_random(text[start:end])):
                shown = "a password" if kind in ("basic", "url password") else f"a {kind}"
                raise PolicyDenied(
                    f"the {what} contains what looks like {shown} ({end - start!r} characters)",
                    hint="take it out, and if it is real, have it replaced: it was sent to this gateway",
                    details={"kind": kind},
                )


BUILT_IN: dict[str, GuardrailFactory] = {
    MaxSize.name: MaxSize,
    DenyPatterns.name: DenyPatterns,
    Secrets.name: Secrets,
}


# Texts


def _part_texts(parts: Sequence[Part]) -> list[str]:
    texts: list[str] = []
    for part in parts:
        match part:
            case TextPart() | ThinkingPart():
                texts.append(part.text)
            case ToolCallPart():
                texts += (part.name, *_body_texts(part.arguments)[0])
            case ToolResultPart():
                texts.append(part.content)
            case ImagePart():
                texts += [part.url] if part.url and not part.url.startswith("data:") else []
    return texts


def _body_texts(body: object) -> tuple[tuple[str, ...], int]:
    """All texts within a JSON value, in order, and the number of images."""
    texts: list[str] = []
    images = 0
    left: list[object] = [body]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if not item.startswith("data:"):
                texts.append(item)
        elif isinstance(item, dict):
            fields = cast(JsonObject, item)
            images += fields.get("type") in _IMAGE_KINDS
            if fields.get("type") == "base64":
                continue
            for key, value in reversed(fields.items()):
                if key == "arguments" and isinstance(value, str):
                    left.append(_parsed(value))
                elif key not in _LABELS:
                    left.append(value)
        elif isinstance(item, list):
            left.extend(reversed(cast(list[object], item)))
    return tuple(texts), images


def _parsed(arguments: str) -> object:
    """Arguments of a tool call are JSON within a string, whose escapes could hide what is looked for."""
    try:
        return orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
