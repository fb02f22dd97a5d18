"""The rules by which a team runs a test suite."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import PathNotFound
from agentic_flow.core.messages import CompletionRequest, Message, TextPart, ToolCallPart, ToolResultPart
from agentic_flow.swarm.bench_suite import PROGRAM, Suite, SuiteModel, policy_text, suite_of
from agentic_flow.swarm.citations import Claim, parse_claims
from agentic_flow.swarm.prompts import planner_prompt, read_plan, reviewer_prompt, worker_prompt
from agentic_flow.tools.policy import Policy, load_policy


def asked(prompt: str, agent: str, *turns: Message) -> CompletionRequest:
    system = Message(role="system", parts=(TextPart(text="You work."),))
    user = Message(role="user", parts=(TextPart(text=prompt),))
    return CompletionRequest(model="test-suite", messages=(system, user, *turns), agent=agent)


def files_of(parts: tuple[object, ...]) -> list[str]:
    return [part.arguments["argv"][-1] for part in parts if isinstance(part, ToolCallPart)]


def results(parts: tuple[object, ...], exit_code: int, said: str) -> tuple[Message, Message]:
    """The agent's calls, and what came back."""
    calls = tuple(part for part in parts if isinstance(part, ToolCallPart))
    content = orjson.dumps({"exit_code": exit_code, "stdout": f"..\n{said}\n", "duration_s": 0.5}).decode()
    answers = tuple(ToolResultPart(id=call.id, name=call.name, content=content) for call in calls)
    return Message(role="assistant", parts=calls), Message(role="user", parts=answers)


@given(st.integers(1, 30), st.integers(1, 12))
def test_each_file_is_run_by_one_agent(files: int, agents: int) -> None:
    """Catches files that nobody runs, or two agents, by plan as well as by the agents' numbers."""
    suite = Suite(Path(), {f"tests/test_{number}.py": 1 for number in range(files)})
    model = SuiteModel(suite, agents)
    (planned,) = model.answer(asked(planner_prompt(suite.goal, agents, []), "planner"))
    assert isinstance(planned, TextPart)
    tasks = read_plan(planned.text, agents).tasks
    prompts = [worker_prompt(suite.goal, task.question, []) for task in tasks]
    if len(tasks) > 1:  # one task with all files is the goal itself
        by_plan = [files_of(model.answer(asked(text, f"worker-{n}"))) for n, text in enumerate(prompts, 1)]
        assert sorted(path for own in by_plan for path in own) == sorted(suite.files)
    whole = worker_prompt(suite.goal, suite.goal, [])
    by_number = [files_of(model.answer(asked(whole, f"link-{n}"))) for n in range(1, agents + 1)]
    assert sorted(path for own in by_number for path in own) == sorted(suite.files)


def test_a_peer_runs_what_failed_at_its_neighbour() -> None:
    """Catches a second round that repeats the first, and reports that lose what others found."""
    suite = Suite(Path(), {"test_a.py": 1, "test_b.py": 3})
    model = SuiteModel(suite, 2)
    heard = [
        ("draft-1", "test_a.py: passed (1 passed in 0.1s) [test_a.py:1-1]"),
        ("draft-2", "test_b.py: failed (1 failed in 0.1s) [test_b.py:3-3]"),
    ]
    prompt = worker_prompt(suite.goal, suite.goal, heard)
    first = model.answer(asked(prompt, "peer-1"))
    assert files_of(first) == ["test_b.py"]
    (said,) = model.answer(asked(prompt, "peer-1", *results(first, 0, "1 passed in 0.2s")))
    assert isinstance(said, TextPart)
    assert said.text.splitlines() == [
        "test_a.py: passed (1 passed in 0.1s) [test_a.py:1-1]",
        "test_b.py: passed (1 passed in 0.2s) [test_b.py:3-3]",
    ]
    (own,) = model.answer(asked(prompt, "peer-2"))
    assert isinstance(own, TextPart)


@pytest.mark.parametrize(("exit_code", "supported"), [(1, True), (0, False)])
def test_a_failure_counts_when_it_comes_again(exit_code: int, supported: bool) -> None:
    """Catches a reviewer who believes what he is told, and one who lets no failure stand."""
    suite = Suite(Path(), {"test_a.py": 1, "test_b.py": 1})
    model = SuiteModel(suite, 1)
    text = "test_a.py: failed (1 failed) [test_a.py:1-1]\ntest_b.py: passed (1 passed) [test_b.py:1-1]"
    claims: list[Claim] = parse_claims(text)
    prompt = reviewer_prompt(suite.goal, claims)
    calls = model.answer(asked(prompt, "reviewer"))
    assert files_of(calls) == ["test_a.py"]
    (verdicts,) = model.answer(asked(prompt, "reviewer", *results(calls, exit_code, "1 test")))
    assert isinstance(verdicts, TextPart)
    read = {one["claim"]: one["supported"] for one in orjson.loads(verdicts.text)["verdicts"]}
    assert read == {1: supported, 2: True}


def test_the_policy_allows_pytest_and_nothing_else(tmp_path: Path) -> None:
    """Catches a policy by which agents of the benchmark start another program, or write."""
    (tmp_path / "policy.toml").write_text(policy_text(), "utf-8")
    policy: Policy = load_policy(tmp_path / "policy.toml")
    from agentic_flow.core.auth import LOCAL_OWNER

    def effect(tool: str, *argv: str) -> str:
        return policy.decide(LOCAL_OWNER, tool, "destructive", {"argv": list(argv)}).effect

    assert effect("shell_run", PROGRAM, "-m", "pytest", "test_a.py") == "allow"
    assert effect("shell_run", PROGRAM, "-c", "import this") == "deny"
    assert effect("shell_run", "sh", "-c", f"{PROGRAM} -m pytest x") == "deny"
    assert effect("file_write", PROGRAM, "-m", "pytest", "x") == "deny"


def test_files_are_found_where_tests_are(tmp_path: Path) -> None:
    """Catches tests of installed packages among a repository's own, and files without a line to cite."""
    for name in ("tests/test_a.py", "b_test.py", ".venv/test_no.py", "node_modules/x/test_no.py", "main.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n\nx = 1\n", "utf-8")
    (tmp_path / "test_blank.py").write_text("\n", "utf-8")
    assert dict(suite_of(tmp_path).lines) == {"b_test.py": 3, "tests/test_a.py": 3}
    with pytest.raises(PathNotFound, match="no test files"):
        suite_of(tmp_path, ("*.spec",))
