"""One try with a provider: a key that may be used, the request, and what its outcome says of key and circuit.

A key that the provider refuses, or whose rate is used up, is followed at once by another within the same
try. Every other failure ends the try; the gateway decides whether to repeat it or to go elsewhere.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any

import structlog

from agentic_flow.core.breaker import Permit
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import (
    AgenticFlowError,
    CircuitOpen,
    DeadlineExceeded,
    ProviderError,
    ProviderOverloaded,
    ProviderRejected,
)
from agentic_flow.gateway.health import Health
from agentic_flow.gateway.http1 import Origin, request_head, target_of
from agentic_flow.gateway.keyring import KeyRing, Lease
from agentic_flow.gateway.transport import HttpAnswer, HttpTransport, Pending

_log = structlog.get_logger(__name__)

Headers = Callable[[str | None], Mapping[str, str]]
"""The headers of a request by the key that it is made with."""
Refusal = Callable[[HttpAnswer, str | None], Awaitable[AgenticFlowError]]
"""The error that an answer other than 200 stands for, by the key that it was had with."""

_HEADS_MAX = 256
# The provider does not take the key, its account or its rate: another key may do better.
_ABOUT_THE_KEY = frozenset({401, 402, 403, 429})


class Exchange:
    """An answer under way and the key that it was had with."""

    __slots__ = ("_answer", "_health", "_lease", "_slow", "_started_s", "_streamed", "begun")

    def __init__(self, lease: Lease, health: Health, streamed: bool, started_s: float | None = None) -> None:
        self._lease = lease
        self._health = health
        self._streamed = streamed
        self._started_s = health.clock.monotonic_s() if started_s is None else started_s
        self._slow = False
        self._answer: HttpAnswer | None = None
        self.begun = False
        """Whether something of the answer itself has come."""

    @property
    def answer(self) -> HttpAnswer:
        """The answer, whose status is 200."""
        assert self._answer is not None, "an exchange is given once it has its answer"
        return self._answer

    def answered(self, answer: HttpAnswer) -> None:
        """The headers of an answer are there."""
        self._answer = answer

    def begin(self) -> None:
        """Something of the answer itself has come."""
        if not self.begun:
            self.begun = True
            self._slow = self._streamed and self._overdue()
            self._lease.answering()

    def finished(self) -> None:
        """The answer is whole."""
        if self._slow or (self._streamed and not self.begun and self._overdue()):
            self._lease.failed()
        else:
            self._lease.succeeded()

    def broke(self, error: BaseException) -> None:
        """The answer will not become whole, or there is none."""
        lease = self._lease
        if isinstance(error, DeadlineExceeded):
            # A short deadline is the caller's choice and says little of the provider.
            fails = not self.begun and self._overdue()
            (lease.failed if fails else lease.abandoned)()
        elif isinstance(error, ProviderRejected) and self._answer is not None:
            lease.succeeded()
        elif isinstance(error, ProviderError):
            lease.failed()
        elif isinstance(error, AgenticFlowError):
            lease.succeeded()
        elif self._streamed and not self.begun and self._overdue():
            lease.failed()  # the caller left, and had reason to
        else:
            lease.abandoned()

    def _overdue(self) -> bool:
        return self._health.clock.monotonic_s() - self._started_s >= self._health.slow_call_s


class Begun:
    """An exchange under way whose answer nobody waits for yet: what `open` goes on with."""

    __slots__ = ("_health", "_started_s", "lease", "pending")

    def __init__(self, lease: Lease, pending: Pending, health: Health, started_s: float) -> None:
        self.lease = lease
        self.pending = pending
        self._health = health
        self._started_s = started_s

    def exchange(self) -> Exchange:
        """What somebody who waits needs; made for nobody else."""
        return Exchange(self.lease, self._health, False, self._started_s)

    def finish(self) -> None:
        """The answer is whole, and was used."""
        self.lease.succeeded()  # as `Exchange.finished` of one that is not streamed
        self.pending.taken()

    def drop(self, error: BaseException) -> None:
        """Nobody will wait for it."""
        self.exchange().broke(error)
        self.pending.release()


class Exchanges:
    """How one provider is asked.

    Args:
        provider: Its name.
        base_url: In front of every path.
        keys: Its keys.
        health: Which of them may be used.
        transport: Carries the requests.
    """

    def __init__(
        self, provider: str, base_url: str, *, keys: KeyRing, health: Health, transport: HttpTransport
    ) -> None:
        self._provider = provider
        self._base_url = base_url
        self._keys = keys
        self._health = health
        self._transport = transport
        # By path, key and what else decides: where a request goes, and its head but for the length.
        self._heads: dict[tuple[str | None, ...], tuple[Origin, bytes]] = {}

    def open(
        self,
        method: str,
        path: str,
        *,
        model: str,
        headers: Headers,
        refusal: Refusal,
        body: bytes | None,
        deadline: Deadline,
        streamed: bool,
        aside: bool = False,
        begun: Begun | None = None,
    ) -> AbstractAsyncContextManager[Exchange]:
        """Ask, and give the answer when its status is 200. What happens to it in the block counts.

        Args:
            method, path: The request.
            model: The model that it is for, by which health is kept.
            headers: Its headers.
            refusal: Explains an answer other than 200.
            body: Its body.
            deadline: Of the whole exchange.
            streamed: Whether the answer is a stream, which must begin soon.
            aside: Whether it is a question beside the model's answers; see `Health.aside`.
            begun: The same, asked already: its answer is waited for, and explained as any.

        Raises:
            ProviderError, UnknownModel, DeadlineExceeded: as `Provider.complete`.
            CircuitOpen: no key may be used now.
        """
        return _Opened(
            self._asked(
                method,
                path,
                model,
                headers,
                refusal,
                body,
                deadline,
                streamed=streamed,
                aside=aside,
                begun=begun,
            )
        )

    def begin(
        self,
        path: str,
        *,
        model: str,
        headers: Headers,
        named: tuple[str, ...],
        body: bytes,
        deadline: Deadline,
    ) -> Begun | None:
        """Ask for a whole answer at once, without waiting; None: no connection is there that could be used.

        Args:
            path, model, headers, body, deadline: As for `open`.
            named: What `headers` depends on beside the key: the head of a request is remembered by it.

        Raises:
            ProviderOverloaded, CircuitOpen, InvalidSettings: as `KeyRing.pick`.
            DeadlineExceeded: no time is left.
            ValueError: the URL or a header is wrong.
        """
        health = self._health
        lease = self._keys.pick(model, partial(health.permit, self._provider, model=model))
        started_s = health.clock.monotonic_s()
        try:
            place = (path, lease.value, *named)
            known = self._heads.get(place)
            if known is None:
                if len(self._heads) >= _HEADS_MAX:
                    self._heads.clear()
                target = target_of(self._base_url + path)
                head = request_head("POST", target, headers(lease.value), None)
                known = self._heads[place] = target.origin, head[:-2] + b"content-length: %d\r\n\r\n"
            origin, head = known
            pending = self._transport.send_at_once(
                origin, head % len(body), body, provider=self._provider, deadline=deadline
            )
        except BaseException as error:
            Exchange(lease, health, False, started_s).broke(error)
            raise
        if pending is None:
            lease.abandoned()
            return None
        return Begun(lease, pending, health, started_s)

    async def _asked(
        self,
        method: str,
        path: str,
        model: str,
        headers: Headers,
        refusal: Refusal,
        body: bytes | None,
        deadline: Deadline,
        *,
        streamed: bool,
        aside: bool,
        begun: Begun | None,
    ) -> Exchange:
        """The exchange whose answer's status is 200, still to be finished and closed."""
        passing: list[str] = []
        forbidden: list[Lease] = []
        # An answer that is not streamed is silent while the model writes.
        patience_s = self._transport.idle_timeout_s if streamed else None
        permit = self._health.aside if aside else self._health.permit

        def leave(key_id: str) -> Permit:
            return permit(self._provider, key_id, model)

        lease = self._keys.pick(model, leave) if begun is None else begun.lease
        while True:
            exchange = Exchange(lease, self._health, streamed) if begun is None else begun.exchange()
            try:
                if begun is None:
                    answer = await self._transport.send(
                        method,
                        self._base_url + path,
                        provider=self._provider,
                        headers=headers(lease.value),
                        body=body,
                        deadline=deadline,
                        patience_s=patience_s,
                    )
                else:
                    pending, begun = begun.pending, None
                    answer = await self._transport.received(pending)
                if answer.status == 200:
                    exchange.answered(answer)
                    for earlier in forbidden:
                        earlier.confirm_forbidden()
                    return exchange
                try:
                    error = await refusal(answer, lease.value)
                finally:
                    answer.close()
            except BaseException as broken:
                exchange.broke(broken)
                raise
            _report(lease, answer.status, error)
            if answer.status not in _ABOUT_THE_KEY:
                raise error
            if answer.status in (402, 403):
                forbidden.append(lease)
            passing.append(lease.key_id)
            lease = self._other(model, leave, lease, passing, answer.status, error)

    def _other(
        self,
        model: str,
        leave: Callable[[str], Permit],
        lease: Lease,
        passing: list[str],
        status: int,
        error: AgenticFlowError,
    ) -> Lease:
        """Another key to take over.

        Raises:
            AgenticFlowError: there is none: `error`, or when one can be used if that one says so.
        """
        try:
            other = self._keys.pick(model, leave, passing=passing)
        except (CircuitOpen, ProviderOverloaded) as none:
            soonest_s = none.retry_after_s
            if status == 429:
                if error.retry_after_s is not None and soonest_s is not None:
                    error.retry_after_s = min(error.retry_after_s, soonest_s)
                raise error from None
            if soonest_s is None or none.details.get("keys_refused"):
                raise error from None
            raise none from error
        _log.info(
            "key_taken_over",
            provider=self._provider,
            model=model,
            key_id=lease.key_id,
            other_key_id=other.key_id,
            status=status,
        )
        return other


class _Opened:
    """What `async with exchanges.open(…)` works on. A generator for it costs more than all it does."""

    __slots__ = ("_asked", "_exchange")

    def __init__(self, asked: Coroutine[Any, Any, Exchange]) -> None:
        self._asked = asked
        self._exchange: Exchange | None = None

    async def __aenter__(self) -> Exchange:
        self._exchange = exchange = await self._asked
        return exchange

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        exchange = self._exchange
        assert exchange is not None, "entered before it is left"
        try:
            if error is None:
                exchange.finished()
            else:
                exchange.broke(error)
        finally:
            exchange.answer.close()


def _report(lease: Lease, status: int, error: AgenticFlowError) -> None:
    """What a refused request says of its key and of the provider."""
    if status == 401:
        lease.refused()
    elif status in (402, 403):
        lease.forbidden()
    elif status == 429:
        lease.rested(error.retry_after_s)
    elif isinstance(error, ProviderError) and not isinstance(error, ProviderRejected):
        lease.failed()
    else:
        lease.succeeded()
