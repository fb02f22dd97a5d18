"""A call that this process answers by itself, without a provider: it keeps the same rules as any other.

Guardrails → rate limits → a place at the door → budget → the work → the books.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import PolicyDenied
from agentic_flow.core.messages import Completion, Usage
from agentic_flow.gateway.budgets.service import Reservation
from agentic_flow.gateway.calls import CallRecord, nano_usd
from agentic_flow.gateway.guardrails import GuardedRequest
from agentic_flow.gateway.limits import Admission
from agentic_flow.gateway.policies import Caller, GatewayPolicies
from agentic_flow.gateway.questions import Destination, Question
from agentic_flow.gateway.walk import House

LOCAL = "local"
"""What the books call the provider that is this process."""

T = TypeVar("T")


class LocalCall:
    """One call. Use `run`, once.

    Args:
        house: What every call uses.
        question: What is asked; its tokens are estimated.
        model: Who answers, as the books and prices name it.
        principal: Who asks.
        deadline: Of the whole call.
        request_id: Of the request that brought it.
    """

    def __init__(
        self,
        house: House,
        question: Question,
        model: str,
        *,
        principal: Principal,
        deadline: Deadline,
        request_id: str,
    ) -> None:
        self.headers: dict[str, str] = {}
        """What the answer's headers say of limits; there once it is admitted."""
        self._house = house
        self._question = question
        self._deadline = deadline.earliest(house.timeout_s)
        self._caller = Caller.of(principal, question.agent, question.run)
        self._call = CallRecord(question, self._caller, request_id, house.books, house.clock)
        self._call.destination = Destination(LOCAL, model, None)
        self._model = model

    async def run(self, work: Callable[[Deadline], Awaitable[T]], tokens: int) -> T:
        """What `work` gives within the time that is left.

        Args:
            work: Does it.
            tokens: What it reads, for the books.

        Raises:
            RateLimited, BudgetExceeded, PolicyDenied: what operators set does not allow it.
            Unavailable: too much is under way.
            AgenticFlowError: as `work`.
        """
        house, question, call = self._house, self._question, self._call
        admission: Admission | None = None
        with call.span() as span:
            try:
                if house.open is not None:
                    await house.open()
                policies = house.policies()
                guardrails = house.guardrails(policies)
                if not guardrails.empty:
                    await guardrails.before(GuardedRequest(self._caller, question.asked, question.sent()))
                if policies.limits:
                    admission = house.limits.admit(self._caller, question.asked, tokens, policies.limits)
                    if question.wire is not None:
                        self.headers |= admission.headers(question.wire)
                async with house.door.enter(self._deadline, tenant=self._caller.tenant):
                    found, usage = await self._paid(policies, work, tokens)
                if admission is not None:
                    admission.settle(tokens)
            except BaseException as error:
                if admission is not None:
                    admission.release()
                call.failed(span, error)
                raise
            call.estimated = True
            call.finished(
                span,
                Completion(model=self._model, provider=LOCAL, parts=(), stop_reason="end", usage=usage),
            )
            return found

    async def _paid(
        self, policies: GatewayPolicies, work: Callable[[Deadline], Awaitable[T]], tokens: int
    ) -> tuple[T, Usage]:
        house = self._house
        rates = house.rates(LOCAL, self._model)
        usage = Usage(input_tokens=tokens, cost_usd=None)
        reservation: Reservation | None = None
        if policies.budgets and house.budgets is not None:
            if rates is not None:
                most = rates.cost_max_usd(self._question.input_tokens_max(), 0)
                reservation = await house.budgets.reserve(self._caller, policies.budgets, nano_usd(most))
            elif house.budgets.left(self._caller, policies.budgets):
                raise PolicyDenied(
                    f"no price is known for {LOCAL}:{self._model}, and a budget is in force",
                    hint="give its price in gateway.prices_usd_per_mtok, or ask for another model",
                )
        try:
            self._call.tries += 1
            found = await work(self._deadline)
        except BaseException:
            if reservation is not None:
                reservation.release()
            raise
        if rates is not None:
            usage = usage.model_copy(update={"cost_usd": rates.cost_usd(usage)})
        if reservation is not None:
            reservation.settle(nano_usd(usage.cost_usd or 0.0))
        return found, usage
