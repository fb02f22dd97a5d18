"""OpenAI Embeddings as its SDK knows them: `POST /v1/embeddings`.

A model of a provider that speaks OpenAI's format is asked with nothing but its name rewritten, and its answer
passes through untouched. The platform's own embedder answers to `local` and to its id, by the same
guardrails, limits, budgets and books; a header then says whether closeness of its vectors means likeness of
meaning.
"""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import AgenticFlowError, DeadlineExceeded, InvalidInput, TooLarge, UnknownModel
from agentic_flow.core.messages import CompletionRequest, JsonObject
from agentic_flow.core.ports import Embedder
from agentic_flow.core.web import deadline_of, require
from agentic_flow.gateway.front.errors import FrontError
from agentic_flow.gateway.front.fields import Fields, read_body, untranslatable, wrong
from agentic_flow.gateway.front.routes import (
    COUNT_HEADER,
    IDEMPOTENCY_HEADER,
    SCOPE,
    TIMEOUT_MAX_S,
    labels_of,
)
from agentic_flow.gateway.front.streaming import unless_gone
from agentic_flow.gateway.local_calls import LOCAL, LocalCall
from agentic_flow.gateway.questions import BodyQuestion, Destination
from agentic_flow.gateway.service import Gateway
from agentic_flow.gateway.wire.format import estimate_tokens
from agentic_flow.gateway.wire.passing import PassingRequest, rename_model
from agentic_flow.gateway.wire.responses_passing import EMBEDDINGS_PATH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEMANTIC_HEADER = "x-agentic-flow-embedder-semantic"
WIRE = "embeddings"

INPUTS_MAX = 2048
INPUT_CHARS_MAX = 64_000
"""Longest text for the platform's own embedder."""
CHARS_MAX = 2_000_000
"""Most characters of one request to it."""


class EmbeddingCall(NamedTuple):
    """A decoded request for the platform's own embedder."""

    texts: tuple[str, ...]
    encoding: Literal["float", "base64"]


def build_embedding_routes(gateway: Gateway, embedder: Embedder | None) -> list[Route]:
    """The route of embeddings; it demands the scope `models:use`.

    Args:
        gateway: Passes requests on to providers.
        embedder: Answers to `local` and to its id; None where there is none.
    """

    async def embeddings(request: Request) -> Response:
        try:
            return await _answer(request, gateway, embedder)
        except AgenticFlowError as error:
            raise FrontError(error, WIRE) from error

    return [Route("/v1/embeddings", embeddings, methods=["POST"])]


async def _answer(request: Request, gateway: Gateway, embedder: Embedder | None) -> Response:
    principal = require(request, SCOPE)
    body = await request.body()
    sent = read_body(body)
    model = Fields(sent).demand("model")
    _check_count(sent.get("input"))
    question = _EmbeddingQuestion(body, sent, model, wire=WIRE, stream=False, **labels_of(request))
    if embedder is not None and model in (LOCAL, embedder.id):
        call = gateway.local_call(
            question,
            embedder.id,
            principal=principal,
            deadline=deadline_of(request, TIMEOUT_MAX_S),
            request_id=request.state.request_id,
        )
        return await _local(request, embedder, decode_embeddings(sent, embedder), call)
    if model == LOCAL:
        raise UnknownModel("no embedder runs here", hint="ask an embedding model of openai or openrouter")
    destination = await gateway.destination(model)
    if WIRE not in destination.passes:
        raise _makes_none(destination.provider, model, embedder)
    walk = gateway.walk(
        question,
        principal=principal,
        deadline=deadline_of(request, TIMEOUT_MAX_S),
        idempotency_key=request.headers.get(IDEMPOTENCY_HEADER),
        request_id=request.state.request_id,
    )
    answer = await unless_gone(request, walk.whole())
    return Response(answer.body, media_type="application/json", headers=walk.headers)


class _EmbeddingQuestion(BodyQuestion):
    """A request for embeddings, which pass through or are refused."""

    operation = "embeddings"

    def request(self) -> CompletionRequest:
        raise InvalidInput(
            f"the model {self.asked!r} makes no embeddings",
            hint="ask an embedding model of openai or openrouter",
            details={"field": "model"},
        )

    def passing(self, destination: Destination) -> PassingRequest:
        native = destination.model
        body = self._body if self.asked == native else rename_model(self._body, native)
        return PassingRequest(path=EMBEDDINGS_PATH, headers={}, body=body, sent=self._sent, stream=False)

    def output_tokens_max(self) -> int:
        return 0


def _check_count(value: object) -> None:
    if isinstance(value, list):
        entries = cast(list[object], value)
        tokens = bool(entries) and all(isinstance(entry, int) for entry in entries)
        if len(entries) > INPUTS_MAX and not tokens:
            raise TooLarge(
                f"the field 'input' holds {len(entries)} inputs; the limit is {INPUTS_MAX}",
                hint="send them in several requests",
                details={"field": "input"},
            )


def _makes_none(provider: str, model: str, embedder: Embedder | None) -> InvalidInput:
    known = "an embedding model of openai or openrouter"
    if embedder is not None:
        known = f"{LOCAL!r} ({embedder.id}), or {known}"
    return InvalidInput(
        f"the model {model!r} of {provider} makes no embeddings",
        hint=f"ask {known}",
        details={"field": "model"},
    )


# The platform's own embedder


def decode_embeddings(body: JsonObject, embedder: Embedder) -> EmbeddingCall:
    """The request of a body, for an embedder that reads texts.

    Raises:
        InvalidInput: a field is wrong or asks for what the embedder cannot do; `details["field"]` names it.
        TooLarge: the texts are past a limit.
    """
    fields = Fields(body)
    fields.demand("model")
    texts = _texts(fields.take("input"))
    encoding = fields.text("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise wrong("encoding_format", "must be float or base64", encoding)
    dimensions = fields.integer("dimensions", least=1)
    if dimensions not in (None, embedder.dimension):
        # A vector that was not made to be cut short loses its meaning when it is.
        raise wrong("dimensions", f"must be {embedder.dimension}, the dimension of {embedder.id}", dimensions)
    fields.text("user")  # for the abuse checks of a provider; there is none here
    fields.finish()
    return EmbeddingCall(texts, encoding)


def _texts(value: object) -> tuple[str, ...]:
    given = cast(list[object], value if isinstance(value, list) else [value])
    if given and not isinstance(given[0], str) and isinstance(value, list):
        raise untranslatable("input", given)  # tokens of a model that does not answer here
    if not given:
        raise wrong("input", "must be a text, or a list of at least one", given)
    total = 0
    texts: list[str] = []
    for position, text in enumerate(given):
        at = f"input.{position}" if isinstance(value, list) else "input"
        if not isinstance(text, str) or not text:
            raise wrong(at, "must be a string that is not empty", text)
        total += len(text)
        if len(text) > INPUT_CHARS_MAX or total > CHARS_MAX:
            raise TooLarge(
                f"the field {at!r} passes a limit: {INPUT_CHARS_MAX} characters an input, "
                f"{CHARS_MAX} a request",
                hint="split the text, or send it in several requests",
                details={"field": at},
            )
        texts.append(text)
    return tuple(texts)


async def _local(request: Request, embedder: Embedder, asked: EmbeddingCall, call: LocalCall) -> Response:
    tokens = sum(estimate_tokens(text) for text in asked.texts)

    async def work(deadline: Deadline) -> NDArray[np.float32]:
        deadline.check("embedding")
        try:
            async with asyncio.timeout(deadline.remaining_s):
                return await embedder.embed(asked.texts, kind="document")
        except TimeoutError:
            raise DeadlineExceeded(
                f"{len(asked.texts)} texts were not embedded in time", hint="send fewer, or give more time"
            ) from None

    vectors = await unless_gone(request, call.run(work, tokens))
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(vector, asked.encoding)}
            for index, vector in enumerate(vectors)
        ],
        "model": embedder.id,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    headers = {
        **call.headers,
        SEMANTIC_HEADER: "true" if embedder.semantic else "false",
        COUNT_HEADER: "estimated",
    }
    return Response(
        orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY),
        media_type="application/json",
        headers=headers,
    )


def _written(vector: NDArray[np.float32], encoding: Literal["float", "base64"]) -> object:
    if encoding == "float":
        return vector
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
