"""Bounded retries of one provider call: full jitter, Retry-After honoured, never past the deadline.

Within one try the provider goes over its keys without a pause (`gateway/exchange.py`): what arrives here is
about the provider as a whole. A circuit that is open refuses a new call at once. A call that was under way
when it opened waits for it like for any other pause, because it may not go elsewhere any more.

Source: M. Brooker, "Exponential Backoff and Jitter" (AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from agentic_flow.core.clock import SYSTEM_CLOCK, Clock, Deadline
from agentic_flow.core.errors import AgenticFlowError, CircuitOpen, DeadlineExceeded, ProviderError

_log = structlog.get_logger(__name__)
PAUSE_MAX_S = 30.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently.

    Args:
        attempts: Tries, the first included.
        backoff_s: Upper bound of the first pause; it doubles with each try, up to PAUSE_MAX_S.
        clock: Waits.
        rng: Draws the jitter.
    """

    attempts: int
    backoff_s: float
    clock: Clock = SYSTEM_CLOCK
    rng: random.Random = field(default_factory=random.Random)

    async def run(
        self,
        call: Callable[[], Awaitable[Result]],
        *,
        provider: str,
        deadline: Deadline,
        attempts: int | None = None,
        begun: bool = False,
    ) -> Result:
        """Call until it succeeds.

        Args:
            call: One try.
            provider: Named in errors and logs.
            deadline: Of all tries together.
            attempts: Tries, instead of the policy's own number: 1 where another provider can take over.
            begun: The first try is under way; `call` only has to hear how it ends.

        Raises:
            ProviderError: the last one, which says how many tries were made.
            CircuitOpen: the first try was refused, because the provider is known to fail.
            DeadlineExceeded: the time ended first; names the last failure.
        """
        attempts = self.attempts if attempts is None else attempts
        last: ProviderError | None = None
        for attempt in range(1, attempts + 1):
            if deadline.remaining_s <= 0 and not (begun and attempt == 1):
                raise out_of_time(provider, attempt - 1, last)
            pause_s: float | None = None
            try:
                return await call()
            except ProviderError as error:
                last = error
                if not error.retryable:
                    raise tried(error, provider, attempt) from error
            except CircuitOpen as error:
                if last is None:
                    raise
                pause_s = error.retry_after_s
            except DeadlineExceeded as error:
                raise out_of_time(provider, attempt, last) from error
            if attempt < attempts:
                await self._pause(last, provider, attempt, deadline, pause_s)
        assert last is not None
        raise tried(last, provider, attempts) from last

    async def _pause(
        self,
        error: ProviderError,
        provider: str,
        attempt: int,
        deadline: Deadline,
        circuit_s: float | None,
    ) -> None:
        pause_s = self.rng.uniform(0, min(PAUSE_MAX_S, self.backoff_s * 2 ** (attempt - 1)))
        # With jitter on top of it: many calls wait for the same moment, and one probe is let through then.
        asked_s = error.retry_after_s if circuit_s is None else circuit_s + pause_s
        if asked_s is not None:
            pause_s = max(asked_s, pause_s)
        if pause_s >= deadline.remaining_s:
            # Waiting would only turn a clear error into a late one.
            raise tried(error, provider, attempt, waiting_s=pause_s) from error
        _log.info(
            "provider_retried",
            provider=provider,
            attempt=attempt,
            pause_s=round(pause_s, 3),
            error_code=error.code,
            error=error.message,
        )
        await self.clock.sleep(pause_s)


def tried(
    error: ProviderError, provider: str, tries: int, *, waiting_s: float | None = None
) -> AgenticFlowError:
    """The same error, saying how often it was tried and what the last status was."""
    message = error.message
    if tries > 1 or error.retryable:
        message = f"{provider} failed after {tries} {'try' if tries == 1 else 'tries'}: {message}"
    if waiting_s is not None:
        message = f"{message} (the next try in {waiting_s:.1f} s would come after the deadline)"
    return type(error)(
        message,
        hint=error.hint,
        retry_after_s=error.retry_after_s,
        details={"provider": provider, **error.details, "tries": tries},
    )


def out_of_time(provider: str, tries: int, last: ProviderError | None) -> DeadlineExceeded:
    """No answer in time, and what was seen until then."""
    seen = f"; before that: {last.message}" if last else ""
    return DeadlineExceeded(
        f"{provider} gave no answer in time ({tries} {'try' if tries == 1 else 'tries'} made{seen})",
        hint="give the call longer (setting gateway.timeout_s), or ask for less",
        details={"provider": provider, "tries": tries, **(last.details if last else {})},
    )
