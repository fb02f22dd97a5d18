"""Questions that runs ask people, as their records tell of them, and which answers are taken.

A question is a recorded step `question:ID` of the workflow that asks; its answer is a message of topic
`answer:ID`, which the workflow's next step `receive:answer:ID` takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from pydantic import Field

from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.messages import Frozen, JsonObject
from agentic_flow.core.ports import MessageRecord, StepRecord

QUESTION, ANSWER, RECEIPT = "question:", "answer:", "receive:"
SIGNAL = "signal:"
"""Of the topic of a signal; its payload is `{"value": …, "by": sender}`."""
QUESTION_CHARS_MAX = 10_000
OPTIONS_MAX = 100

QuestionState = Literal["open", "answered", "expired", "closed"]


class AnswerRequest(Frozen):
    """The answer to a question: one of its options, or any text when it has none."""

    answer: str = Field(min_length=1, max_length=100_000)


class Question(Frozen):
    """A question of a run.

    `state`: `open`; `answered` (by `answered_by`); `expired` (its time is over; `answer` is then its default,
    if it has one); `closed` (who asked has ended without an answer).
    """

    id: str
    agent: str
    text: str
    options: tuple[str, ...] = ()
    default: str | None = None
    state: QuestionState = "open"
    asked_at_s: float | None = None
    until_s: float | None = None
    answer: str | None = None
    answered_by: str | None = None
    scope: str | None = None
    """What whoever answers must hold beside `runs:write`."""


def check_question(text: str, options: Sequence[str], default: str | None) -> None:
    """Refuse a question that nobody could answer.

    Raises:
        InvalidInput: it is empty or too long, has too many or repeated options, or a default that is none.
    """
    if not 0 < len(text) <= QUESTION_CHARS_MAX:
        raise InvalidInput(
            f"a question of {len(text)} characters: {text[:40]!r}", hint=f"ask in 1 to {QUESTION_CHARS_MAX}"
        )
    if len(options) > OPTIONS_MAX or len(set(options)) < len(options) or "" in options:
        raise InvalidInput(
            f"the options {list(options)[:10]!r} of {text[:40]!r}",
            hint=f"offer at most {OPTIONS_MAX}, each once and none empty",
        )
    if default is not None and options and default not in options:
        raise InvalidInput(
            f"the default {default!r} is no option of {text[:40]!r}", hint=f"use one of {list(options)!r}"
        )


def questions_of(
    run_id: str,
    steps: Sequence[StepRecord],
    messages: Sequence[MessageRecord],
    *,
    now_s: float,
    ended: Collection[str] = (),
) -> list[Question]:
    """The questions of a run, in the order in which they were asked.

    Args:
        run_id: The run.
        steps: All its recorded steps.
        messages: All messages to it.
        now_s: The present, in seconds since 1970.
        ended: The workflows of its tree, itself included, that have ended.
    """
    receipt = f"{RECEIPT}{ANSWER}"
    receipts = {s.name.removeprefix(receipt): s for s in steps if s.name.startswith(receipt)}
    sent = {m.topic.removeprefix(ANSWER): m for m in messages if m.topic.startswith(ANSWER)}
    return [
        _question(
            run_id,
            step,
            step.output,
            receipts.get(str(step.output["id"])),
            sent.get(str(step.output["id"])),
            now_s=now_s,
            has_ended=step.workflow_id in ended,
        )
        for step in steps
        if step.name.startswith(QUESTION) and step.output is not None
    ]


def _question(
    run_id: str,
    step: StepRecord,
    asked: JsonObject,
    receipt: StepRecord | None,
    sent: MessageRecord | None,
    *,
    now_s: float,
    has_ended: bool,
) -> Question:
    state: QuestionState = "open"
    answer: Any = None
    by: str | None = None
    until_s = asked["until_s"]
    if receipt is not None:  # what the run went on with, whatever came later
        taken = receipt.output or {}
        state = "expired" if taken.get("key") is None else "answered"
        payload: JsonObject = taken.get("payload") or {}
        answer, by = payload.get("answer"), taken.get("sender")
    elif sent is not None:
        state, answer, by = "answered", sent.payload.get("answer"), sent.sender
    elif has_ended:
        state = "closed"
    elif until_s is not None and now_s >= until_s:
        state, answer = "expired", asked["default"]
    return Question(
        id=asked["id"],
        agent=step.workflow_id.removeprefix(run_id).lstrip(".") or "run",
        text=asked["text"],
        options=tuple(asked["options"]),
        default=asked["default"],
        state=state,
        asked_at_s=step.completed_at_s,
        until_s=until_s,
        answer=answer,
        answered_by=by,
        scope=asked.get("scope"),
    )


def check_answer(question: Question, answer: str) -> None:
    """Refuse an answer that the question does not take (any more).

    Raises:
        InvalidInput: it is none of the options.
        Conflict: the question has another answer, or waits for none.
    """
    if question.options and answer not in question.options:
        raise InvalidInput(
            f"{answer[:100]!r} is no option of question {question.id!r}",
            hint=f"answer with one of {list(question.options)!r}",
        )
    if question.state == "answered":
        if question.answer != answer:
            raise Conflict(
                f"question {question.id!r} was answered {question.answer!r} by {question.answered_by!r}",
                hint="an answer cannot be changed: the run may have gone on with it",
            )
    elif question.state != "open":
        raise Conflict(
            f"question {question.id!r} is {question.state} and takes no answer",
            hint="the run went on with the default" if question.state == "expired" else "start a new run",
        )
