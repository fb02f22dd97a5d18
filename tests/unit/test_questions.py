"""What is said of a run's questions, from its records alone."""

from __future__ import annotations

import pytest

from agentic_flow.core.errors import Conflict, InvalidInput
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import MessageRecord, StepRecord
from agentic_flow.swarm.questions import Question, check_answer, check_question, questions_of

ASKED: JsonObject = {"id": "a.q1", "text": "Go?", "options": ["yes", "no"], "default": "no", "until_s": 100.0}


def step(name: str, output: JsonObject | None, error: JsonObject | None = None) -> StepRecord:
    return StepRecord("run-1.a", 1, name, output, error, 1.0, 2.0)


def the_question(
    *steps: StepRecord, sent: str | None = None, now_s: float = 50.0, ended: bool = False
) -> Question:
    messages = (
        []
        if sent is None
        else [MessageRecord("run-1", "answer:a.q1", "answer", {"answer": sent}, "ann", 3.0)]
    )
    found = questions_of(
        "run-1",
        [step("question:a.q1", ASKED), step("other", {}), *steps],
        messages,
        now_s=now_s,
        ended=["run-1.a"] if ended else [],
    )
    (question,) = found
    return question


def receipt(key: str | None, answer: str, sender: str | None) -> StepRecord:
    return step("receive:answer:a.q1", {"key": key, "payload": {"answer": answer}, "sender": sender})


def test_states() -> None:
    """Catches a question told as open that nobody waits for, or an answer other than what the run had."""
    told = [
        (q.state, q.answer, q.answered_by)
        for q in (
            the_question(),
            the_question(sent="yes"),
            the_question(sent="yes", now_s=200.0),
            the_question(receipt("answer", "yes", "ann"), sent="yes"),
            the_question(receipt(None, "no", None), now_s=200.0),
            the_question(now_s=100.0),
            the_question(ended=True),
            the_question(step("receive:answer:a.q1", None, {"code": "deadline_exceeded"}), now_s=200.0),
        )
    ]
    assert told == [
        ("open", None, None),
        ("answered", "yes", "ann"),
        ("answered", "yes", "ann"),
        ("answered", "yes", "ann"),
        ("expired", "no", None),
        ("expired", "no", None),
        ("closed", None, None),
        ("expired", None, None),
    ]
    assert the_question().agent == "a"
    assert the_question().asked_at_s == 2.0


def test_answers() -> None:
    """Catches an answer taken that was not offered, that differs from the first, or that comes too late."""
    check_answer(the_question(), "yes")
    check_answer(the_question(sent="yes"), "yes")
    with pytest.raises(InvalidInput, match="perhaps"):
        check_answer(the_question(), "perhaps")
    for late in (the_question(sent="yes"), the_question(now_s=100.0), the_question(ended=True)):
        with pytest.raises(Conflict):
            check_answer(late, "no")


@pytest.mark.parametrize(
    ("text", "options", "default"),
    [
        ("", [], None),
        ("x" * 10_001, [], None),
        ("?", ["a", "a"], None),
        ("?", ["a", ""], None),
        ("?", ["a"], "b"),
    ],
)
def test_questions_that_nobody_can_answer(text: str, options: list[str], default: str | None) -> None:
    """Catches a question that is stored and waited for although no answer to it can be right."""
    with pytest.raises(InvalidInput):
        check_question(text, options, default)
