"""Verdict-gated escalation: models are asked in order until a checker is content.

In a simulation this mattered more than which learner chose the order (`benchmarks/router.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from agentic_flow.core.errors import (
    BudgetExceeded,
    DeadlineExceeded,
    InvalidInput,
    ProviderError,
    RateLimited,
    Unavailable,
)
from agentic_flow.core.messages import Completion, CompletionRequest
from agentic_flow.gateway.checkers import NOT_JUDGED, Checker, Verdict
from agentic_flow.gateway.routing.plan import Candidate


class Escalated(NamedTuple):
    """How an escalation ended.

    Args:
        completion: The answer that stands.
        candidate: Whose it is.
        verdicts: What the checker said of each answer, in the order asked.
        completions: The answers judged, beside their verdicts: each was paid for.
    """

    completion: Completion
    candidate: Candidate
    verdicts: tuple[tuple[Candidate, Verdict], ...]
    completions: tuple[Completion, ...]


async def escalate(
    candidates: Sequence[Candidate],
    ask: Callable[[Candidate], Awaitable[Completion]],
    checker: Checker,
    *,
    request: CompletionRequest,
    tries_max: int,
    judge_last: bool = True,
) -> Escalated:
    """Ask in order until the checker accepts; when nobody is accepted the last answer stands.

    The last answer is checked as well: its verdict changes nothing now, but the router learns from it.

    Args:
        candidates: In the order to ask.
        ask: Has one of them answer.
        checker: Who judges.
        request: What was asked, for the checker.
        tries_max: Answers at most. Candidates that give none are passed over and do not count.
        judge_last: False spares the check of an answer that stands anyway, and reports it as not judged.

    Raises:
        InvalidInput: no candidates, or `tries_max` below 1.
        ProviderError, Unavailable: every candidate failed; the last one's error.
        BudgetExceeded, DeadlineExceeded, RateLimited: before the first answer. Later they end the walk.
    """
    if not candidates or tries_max < 1:
        raise InvalidInput(
            f"escalation over {len(candidates)!r} candidates with tries_max {tries_max!r}",
            hint="give at least one candidate and one try",
        )
    verdicts: list[tuple[Candidate, Verdict]] = []
    completions: list[Completion] = []
    failure: ProviderError | Unavailable | None = None
    for number, candidate in enumerate(candidates, start=1):
        try:
            completion = await ask(candidate)
        except (ProviderError, Unavailable) as error:  # Unavailable: its circuit is open
            failure = error
            continue
        except (BudgetExceeded, DeadlineExceeded, RateLimited):
            if not verdicts:
                raise
            break  # an answer that is paid for is better than none
        last = len(verdicts) + 1 == tries_max or number == len(candidates)
        verdict = NOT_JUDGED if last and not judge_last else await checker.check(request, completion)
        verdicts.append((candidate, verdict))
        completions.append(completion)
        if verdict.accepted or len(verdicts) == tries_max:
            break
    if not verdicts:
        assert failure is not None, "every candidate answered or failed"
        raise failure
    return Escalated(completions[-1], verdicts[-1][0], tuple(verdicts), tuple(completions))
