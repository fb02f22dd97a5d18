"""Judges what became of a trajectory, without knowing the truth: by a model, or by what was recorded.

The model reads the record as quoted evidence (see `prompting`) and answers with an outcome, how sure it is,
and why. Without a model that writes, the verdict follows from how the run ended and which steps failed: from
no word of it, so that "gave up, incomplete" counts no more than "all done".

Source: the judge of "ReasoningBank", arXiv 2509.25140, which labels trajectories without ground truth.
"""

from __future__ import annotations

from typing import Any, cast

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import ProviderProtocol, UnknownModel
from agentic_flow.core.messages import CompletionRequest, JsonObject, ModelInfo
from agentic_flow.core.ports import Completer
from agentic_flow.memory.prompting import only_answer, plain, quote, record_lines, request
from agentic_flow.memory.records import Outcome, Trajectory, Verdict

_OUTCOMES: dict[str, Outcome] = {
    "success": "success",
    "failure": "failure",
    "impossible": "impossible",
    "unknown": "unknown",
}
_REASONS_MAX = 5
_REASON_CHARS_MAX = 500

JUDGE = (
    "You judge whether an agent did what its task asks. You see the record of what it did, nothing else.\n"
    "success: the record shows that all of the task was done. An agent's own claim is no evidence; what its "
    "tools returned is.\n"
    "failure: it was not done, or only in part, or the agent gave up, or nothing in the record supports its "
    "claim.\n"
    "impossible: the record shows that no agent could have done it with what there was.\n"
    "unknown: the record does not tell."
)
_ASKED = (
    'Judge it. Answer with one JSON object and nothing else: {"outcome": "success" | "failure" | '
    '"impossible" | "unknown", "confidence": a number from 0 to 1, "reasons": [up to 5 short sentences that '
    "name steps]}"
)
_AGAIN = " Your last answer was not of that form."


class Judge:
    """Gives verdicts.

    Args:
        completer: Asks models; None: verdicts are mechanical.
        model: The model that judges; None: the one that the run used, or the default where it is gone.
    """

    def __init__(self, completer: Completer | None, *, model: str | None) -> None:
        self._completer = completer
        self._model = model

    async def judging_model(self, principal: Principal) -> str | None:
        """The model that judges a run whose own model is gone or unknown; None: that goes mechanically.

        Raises:
            UnknownModel: the model that was configured to judge is not there.
        """
        served = await writing_model(self._completer, self._model, "", principal=principal)
        return None if served is None else served.id

    async def judge(self, principal: Principal, trajectory: Trajectory, deadline: Deadline) -> Verdict:
        """The verdict on an ended trajectory.

        Args:
            principal: In whose name the model is asked.
            deadline: For all calls together.

        Raises:
            UnknownModel: the model that was configured to judge is not there.
            ProviderProtocol: the model answered twice with no verdict.
            AgenticFlowError: whatever the call raises.
        """
        served = await writing_model(self._completer, self._model, trajectory.model, principal=principal)
        if self._completer is None or served is None:
            return mechanical_verdict(trajectory)
        asked = judge_request(served.id, trajectory)
        answer = await self._completer.complete(asked, principal=principal, deadline=deadline)
        try:
            return read_verdict(answer.text, model=answer.model)
        except ProviderProtocol:
            asked = judge_request(served.id, trajectory, again=True)
            answer = await self._completer.complete(asked, principal=principal, deadline=deadline)
            return read_verdict(answer.text, model=answer.model)


async def writing_model(
    completer: Completer | None, configured: str | None, used: str, *, principal: Principal
) -> ModelInfo | None:
    """The model that judges and distils: the configured one, else the run's own, else the default one.

    None where nothing that writes serves.

    Raises:
        UnknownModel: a model was configured and nothing serves it.
    """
    if completer is None:
        return None
    if configured is not None:
        served = await completer.resolve(configured, principal=principal)
        return served if served.generative else None
    for name in (used or None, None):
        try:
            served = await completer.resolve(name, principal=principal)
        except UnknownModel:
            continue  # the run's provider is gone
        return served if served.generative else None
    return None


def judge_request(
    model: str, trajectory: Trajectory, *, again: bool = False, nonce: str | None = None
) -> CompletionRequest:
    """The call that asks for a verdict."""
    quoted = quote(record_lines(trajectory), nonce=nonce)
    return request(model, JUDGE, quoted, _ASKED + (_AGAIN if again else ""), run=trajectory.run_id)


def read_verdict(text: str, *, model: str | None = None) -> Verdict:
    """The verdict in a judge's answer.

    Raises:
        ProviderProtocol: there is none, or there are two that differ.
    """
    said = only_answer(text, _read, "a verdict")
    return said if model is None else said.model_copy(update={"model": model[:200]})


def mechanical_verdict(trajectory: Trajectory) -> Verdict:
    """The verdict by what was recorded: how the run ended, which steps failed, whether there is an answer.

    A run that completed, with an answer, whose last step did not fail is a success, held with at most even
    confidence; the more of its steps failed, the less.
    """
    failed = sum(step.error is not None for step in trajectory.steps)
    share = failed / len(trajectory.steps) if trajectory.steps else 0.0
    outcome: Outcome = "unknown"
    confidence = 0.0
    if trajectory.outcome == "failed":
        outcome, confidence = "failure", 0.7
        reasons = ["the run ended with an error"]
    elif trajectory.outcome != "completed":
        reasons = [f"the run is {trajectory.outcome}"]
    elif not trajectory.steps or not trajectory.answer:
        reasons = ["the run completed, and left no answer or no steps to tell by"]
    elif trajectory.steps[-1].error is not None:
        outcome, confidence = "failure", 0.5
        reasons = ["the run completed, and its last step failed"]
    else:
        outcome, confidence = "success", 0.5 * (1.0 - share)
        reasons = ["the run completed with an answer, and its last step did not fail"]
    if failed:
        reasons.append(f"{failed} of {len(trajectory.steps)} steps failed")
    return Verdict(
        outcome=outcome, confidence=confidence, reasons=tuple(reasons), source="mechanical", at_s=0.0
    )


def _read(value: JsonObject) -> Verdict | None:
    outcome = value.get("outcome")
    confidence: Any = value.get("confidence")
    reasons: Any = value.get("reasons")
    if not isinstance(outcome, str) or outcome not in _OUTCOMES:
        return None
    if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        return None
    given = cast(list[Any], reasons) if isinstance(reasons, list) else []
    return Verdict(
        outcome=_OUTCOMES[outcome],
        confidence=float(confidence),
        reasons=tuple(kept for reason in given[:_REASONS_MAX] if (kept := plain(reason, _REASON_CHARS_MAX))),
        source="judge",
    )
