"""The embedder behind any endpoint that speaks OpenAI Embeddings: OpenAI, vLLM, Ollama, llama.cpp and kin.

Two endpoints that serve the same model are the same embedder: the id names model and dimension, no address.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import numpy as np
import structlog
from numpy.typing import NDArray
from opentelemetry import trace

from agentic_flow.agentdb.embedders.openai_wire import (
    ANSWER_BYTES_PER_NUMBER,
    Batch,
    Options,
    batches,
    error_of,
    lesser,
    read_answer,
    request_body,
)
from agentic_flow.core.breaker import Breaker
from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    DeadlineExceeded,
    InvalidSettings,
    ProviderError,
    ProviderFailed,
    ProviderProtocol,
    ProviderRejected,
)
from agentic_flow.core.secrets import resolve
from agentic_flow.core.settings import EmbeddingSettings

if TYPE_CHECKING:
    import aiohttp

KNOWN_DIMENSIONS: Mapping[str, int] = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
}
"""Models whose dimension need not be asked for. Source: platform.openai.com/docs/guides/embeddings."""

CALLS_AT_ONCE = 4
_BATCH_CHARS_MAX = (
    600_000  # OpenAI takes 300,000 tokens a request, and few texts need more than one per two characters
)
_ANSWER_ROOM_BYTES = 64 * 1024
_DIMENSION_MAX = 16_384
_CONNECT_TIMEOUT_S = 10.0
_KEEPALIVE_S = 30.0
_BACKOFF_S = 0.5
_PAUSE_MAX_S = 30.0
_PROBE = "dimension"

_log = structlog.get_logger(__name__)
_tracer = trace.get_tracer("agentic_flow.agentdb")


class OpenAIEmbedder:
    """Embeds over HTTP. Bound to the event loop that first uses it; `close` it there.

    The dimension is that of the settings or of a known model; else `prepare` learns it from the endpoint.

    Args:
        settings: Endpoint, model, key and limits. Without a key none is sent.
        clock: Deadlines and pauses.
        rng: Draws the jitter of pauses.

    Raises:
        InvalidSettings: `base_url` is no plain http or https address.
    """

    semantic = True

    def __init__(
        self, settings: EmbeddingSettings, *, clock: Clock = SYSTEM_CLOCK, rng: random.Random | None = None
    ) -> None:
        self._url, self._peer = _endpoint(settings.base_url)
        self._model = settings.model
        self._key = resolve(settings.api_key, settings.api_key_file)
        self._timeout_s = settings.timeout_s
        self._attempts = settings.attempts
        self._batch_max = settings.batch_max
        self._dimension = settings.dimension or KNOWN_DIMENSIONS.get(settings.model)
        self._options = Options(dimensions=settings.dimension, base64=True)
        self._clock = clock
        self._rng = rng or random.Random()
        self._breaker = Breaker(self._peer, clock=clock)
        self._slots = asyncio.Semaphore(CALLS_AT_ONCE)
        self._session: aiohttp.ClientSession | None = None

    @property
    def id(self) -> str:
        return f"openai:{self._model}-{self.dimension}"

    @property
    def dimension(self) -> int:
        """Length of the vectors.

        Raises:
            InvalidSettings: it is neither set nor known, and nobody called `prepare`.
        """
        if self._dimension is None:
            raise InvalidSettings(
                f"the dimension of the model {self._model!r} is not known yet",
                hint="set agentdb.embedding.dimension, or call prepare() first",
            )
        return self._dimension

    async def prepare(self) -> None:
        """Ask the endpoint for one vector when the dimension is not known. Idempotent.

        Raises:
            AgenticFlowError: as `embed`.
        """
        if self._dimension is None:
            await self._call(Batch((0,), (_PROBE,)))

    async def embed(
        self, texts: Sequence[str], *, kind: Literal["document", "query"] = "document"
    ) -> NDArray[np.float32]:
        """See Embedder. A text without any sign is the zero vector, and is not sent.

        Raises:
            InvalidInput: a text is not Unicode. TooLarge: a text is longer than the model takes; names it.
            ProviderError: the endpoint refused, or failed in every try; says which and how often.
            UnknownModel: it does not have the model.
            DeadlineExceeded: a call took longer than the setting `timeout_s`, all tries together.
            CircuitOpen: not tried, because the last calls failed.
        """
        await self.prepare()
        found = batches(texts, texts_max=self._batch_max, chars_max=_BATCH_CHARS_MAX)
        tasks = [asyncio.create_task(self._call(batch)) for batch in found]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            # One failure, or a cancelled caller, ends the others.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for batch, answer in zip(found, answers, strict=True):
            vectors[list(batch.positions)] = answer
        return vectors

    async def close(self) -> None:
        """Close the connections. Idempotent; the embedder opens others when it is used again."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _call(self, batch: Batch) -> NDArray[np.float32]:
        """One request with its retries: unit vectors of shape (texts, dimension)."""
        async with self._slots:
            with _tracer.start_as_current_span(
                f"embeddings {self._model}",
                kind=trace.SpanKind.CLIENT,
                attributes={
                    "gen_ai.operation.name": "embeddings",
                    "gen_ai.provider.name": "openai",
                    "gen_ai.request.model": self._model,
                    "server.address": self._peer,
                },
            ):
                return await self._guarded(batch)

    async def _guarded(self, batch: Batch) -> NDArray[np.float32]:
        """The same, held back while the endpoint fails."""
        permit = self._breaker.acquire()
        try:
            vectors = await self._retried(batch, Deadline.after(self._timeout_s, self._clock))
            permit.succeeded()
            return vectors
        except AgenticFlowError as error:
            if error.retryable:
                permit.failed()
            elif isinstance(error, ProviderError):
                permit.succeeded()  # it is there, and answers
            raise
        finally:
            permit.abandoned()

    async def _retried(self, batch: Batch, deadline: Deadline) -> NDArray[np.float32]:
        """Try until it succeeds: full jitter, Retry-After honoured, never past the deadline.

        Source: M. Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015).
        """
        attempt = 0
        last: ProviderError | None = None
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(deadline.remaining_s):
                    return await self._negotiated(batch)
            except TimeoutError as error:
                raise self._late(attempt, last) from error
            except ProviderError as error:
                if not error.retryable:
                    raise
                last = error
            pause_s = self._rng.uniform(0, min(_PAUSE_MAX_S, _BACKOFF_S * 2 ** (attempt - 1)))
            pause_s = max(pause_s, last.retry_after_s or 0.0)
            if attempt >= self._attempts or pause_s >= deadline.remaining_s:
                raise _tried(last, attempt, None if attempt >= self._attempts else pause_s) from last
            _log.info(
                "embedding_retried",
                peer=self._peer, attempt=attempt, pause_s=round(pause_s, 3),
                error_code=last.code, error=last.message,
            )  # fmt: skip
            await self._clock.sleep(pause_s)

    async def _negotiated(self, batch: Batch) -> NDArray[np.float32]:
        """One try. An optional field that the server refuses is left out from then on.

        Leaving out `dimensions` changes nothing silently: the answer's size is checked all the same.
        """
        while True:
            options, secret = self._options, self._key.get()
            status, headers, body = await self._exchange(
                request_body(self._model, batch, options), batch, secret
            )
            if status == 200:
                return self._checked(read_answer(self._peer, body, len(batch.texts)))
            fewer = lesser(status, body, options)
            if fewer is None:
                raise error_of(
                    self._peer, self._model, batch, status, headers, body,
                    secret=secret, now_s=self._clock.time_s(),
                )  # fmt: skip
            # Other calls may have learned of the other field in the meantime.
            now = self._options
            self._options = Options(fewer.dimensions and now.dimensions, fewer.base64 and now.base64)

    def _checked(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vectors, when they have the dimension of all before them; the first ones set it."""
        size = vectors.shape[1]
        if self._dimension is None and size <= _DIMENSION_MAX:
            self._dimension = size
        if size != self._dimension:
            raise ProviderRejected(
                f"{self._peer} answers with {size!r} numbers a vector for the model {self._model!r}, "
                f"not {self._dimension or _DIMENSION_MAX!r}",
                hint=f"set agentdb.embedding.dimension to {size} if that is the model you want",
                details={"provider": self._peer},
            )
        return vectors

    async def _exchange(
        self, content: bytes, batch: Batch, secret: str | None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers in lower case and the body of one POST; transport failures as errors of ours."""
        import aiohttp

        headers = {"content-type": "application/json"}
        if secret is not None:
            if not (secret.isascii() and secret.isprintable()):
                raise InvalidSettings(
                    "agentdb.embedding.api_key has signs that no HTTP header takes",
                    hint="write the key alone, on one line",
                )
            headers["authorization"] = f"Bearer {secret}"
        size_max = _ANSWER_ROOM_BYTES + ANSWER_BYTES_PER_NUMBER * len(batch.texts) * (
            self._dimension or _DIMENSION_MAX
        )
        try:
            async with self._opened().post(
                self._url, data=content, headers=headers, allow_redirects=False
            ) as answer:
                body = bytearray()
                async for chunk in answer.content.iter_any():
                    body += chunk
                    if len(body) > size_max:
                        raise ProviderRejected(
                            f"the answer of {self._peer} is larger than {size_max!r} bytes",
                            hint="check agentdb.embedding.base_url and dimension",
                            details={"provider": self._peer},
                        )
                shown = {name.lower(): value for name, value in answer.headers.items()}
                return answer.status, shown, bytes(body)
        except aiohttp.ServerTimeoutError as error:
            raise self._failed(f"could not be reached within {_CONNECT_TIMEOUT_S:g} s") from error
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise ProviderRejected(
                f"TLS with {self._peer} failed: {error}",
                hint="its certificate is not trusted here; check agentdb.embedding.base_url",
                details={"provider": self._peer},
            ) from error
        except aiohttp.ClientConnectorError as error:
            raise self._failed(f"could not be reached: {error.strerror or error}") from error
        except aiohttp.ClientPayloadError as error:
            raise ProviderProtocol(
                f"the answer of {self._peer} broke off", hint="try again", details={"provider": self._peer}
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._failed(f"broke the connection: {type(error).__name__}") from error

    def _failed(self, what: str) -> ProviderFailed:
        return ProviderFailed(
            f"{self._peer} {what}",
            hint="check the network and agentdb.embedding.base_url",
            details={"provider": self._peer},
        )

    def _late(self, tries: int, last: ProviderError | None) -> DeadlineExceeded:
        seen = f"; before that: {last.message}" if last else ""
        return DeadlineExceeded(
            f"{self._peer} gave no vectors within {self._timeout_s:g} s ({_counted(tries)} made{seen})",
            hint="raise agentdb.embedding.timeout_s, or lower agentdb.embedding.batch_max",
            details={"provider": self._peer, "tries": tries},
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                # The slots are the limit: waiting for one does not count as the call's time.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
                # The deadline is set around each try.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"user-agent": "agentic-flow"},
            )
        return self._session


def _endpoint(base_url: str) -> tuple[str, str]:
    """The address to post to, and the host to name in messages."""
    parts = urlsplit(base_url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    plain = parts.username is None and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not plain:
        raise InvalidSettings(  # the address is not shown: it may hold a password
            "agentdb.embedding.base_url is no plain http or https address",
            hint="write it as https://HOST/v1, without `/embeddings`; the key is agentdb.embedding.api_key",
        )
    return (
        f"{base_url.rstrip('/')}/embeddings",
        parts.hostname if port is None else f"{parts.hostname}:{port}",
    )


def _tried(error: ProviderError, tries: int, waiting_s: float | None) -> ProviderError:
    """The same error, saying how often it was tried."""
    late = "" if waiting_s is None else f" (the next try in {waiting_s:.1f} s would come after the deadline)"
    return type(error)(
        f"{error.message}, after {_counted(tries)}{late}",
        hint=error.hint,
        retry_after_s=error.retry_after_s,
        details={**error.details, "tries": tries},
    )


def _counted(tries: int) -> str:
    return f"{tries} {'try' if tries == 1 else 'tries'}"
