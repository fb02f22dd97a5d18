"""The limits that a whole run shares: money, tokens and time. Reserved before a call, settled after it.

Agents of one run work in parallel; a limit that is only checked after the fact would be overshot by all of
them at once. What was already recorded before a resume counts too.
"""

from __future__ import annotations

from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import BudgetExceeded, LimitExceeded
from agentic_flow.core.messages import (
    CompletionRequest,
    ImagePart,
    ModelInfo,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.swarm.artifacts import Staged

_BYTES_PER_TOKEN = 2  # common text has 3 to 4: a reservation should rather be too large than too small


class RunBudget:
    """Money, tokens and time of one run in this process.

    Args:
        budget_usd: Hard limit, or None.
        tokens_max: Hard limit on input and output tokens together.
        prices: Model id → its rates; needed only when there is a `budget_usd`.
        deadline: When the run must have ended.
        spent: What recorded calls of earlier attempts consumed.
    """

    def __init__(
        self,
        *,
        budget_usd: float | None,
        tokens_max: int,
        prices: dict[str, ModelInfo],
        deadline: Deadline,
        spent: Usage,
    ) -> None:
        self.deadline = deadline
        self.staged = Staged()
        """Artifacts of the run's steps."""
        self._budget_usd = budget_usd
        self._tokens_max = tokens_max
        self._prices = prices
        self._spent_usd = spent.cost_usd or 0.0
        self._spent_tokens = spent.input_tokens + spent.output_tokens
        self._reserved_usd = 0.0
        self._reserved_tokens = 0

    def reserve(self, request: CompletionRequest) -> tuple[float, int]:
        """Set aside what the call may cost at worst. Pass the result to `settle` or `release`.

        Raises:
            BudgetExceeded: the money left does not cover it.
            LimitExceeded: the tokens left do not cover it.
        """
        input_tokens = _estimate_tokens(request)
        tokens = input_tokens + request.output_tokens_max
        if self._spent_tokens + self._reserved_tokens + input_tokens > self._tokens_max:
            raise LimitExceeded(
                f"the run has used {self._spent_tokens} of its {self._tokens_max} tokens and the next call "
                f"needs about {input_tokens}",
                hint="raise swarm.tokens_max",
            )
        usd = 0.0
        if self._budget_usd is not None:
            usd = self._price(request, input_tokens)
            left = self._budget_usd - self._spent_usd - self._reserved_usd
            if usd > left:
                raise BudgetExceeded(
                    f"the next call of {request.model!r} may cost ${usd:.4f} and ${max(left, 0):.4f} of the "
                    f"run's ${self._budget_usd:.4f} is left",
                    hint="raise --budget-usd, lower swarm.output_tokens_max or take a cheaper model",
                )
        self._reserved_usd += usd
        self._reserved_tokens += tokens
        return usd, tokens

    def settle(self, reservation: tuple[float, int], usage: Usage) -> None:
        """Replace a reservation by what was billed."""
        self.release(reservation)
        self._spent_usd += usage.cost_usd or 0.0
        self._spent_tokens += usage.input_tokens + usage.output_tokens

    def release(self, reservation: tuple[float, int]) -> None:
        """Give a reservation back: the call did not happen or was not billed."""
        self._reserved_usd -= reservation[0]
        self._reserved_tokens -= reservation[1]

    def _price(self, request: CompletionRequest, input_tokens: int) -> float:
        info = self._prices.get(request.model)
        if info is None or info.input_usd_per_mtok is None or info.output_usd_per_mtok is None:
            raise BudgetExceeded(
                f"no price is known for {request.model!r}, so a budget in USD cannot be kept",
                hint="set gateway.prices_usd_per_mtok for it, or leave --budget-usd out",
            )
        return (
            input_tokens * info.input_usd_per_mtok + request.output_tokens_max * info.output_usd_per_mtok
        ) / 1e6


def _estimate_tokens(request: CompletionRequest) -> int:
    texts: list[str] = []
    for message in request.messages:
        for part in message.parts:
            match part:
                case ToolCallPart():
                    texts += [part.name, str(part.arguments)]
                case ToolResultPart():
                    texts.append(part.content)
                case ImagePart():
                    texts.append(part.data or "")
                case _:
                    texts.append(part.text)
    for tool in request.tools:
        texts += [tool.description, str(tool.input_schema)]
    return sum(len(text.encode()) for text in texts) // _BYTES_PER_TOKEN + 1
