"""A team whose work is a repository's test suite: each worker starts pytest on its files, by a tool.

`SuiteModel` stands in the place of a language model: rules, no words of its own. It shares the files out,
calls `shell_run` for each, reports what came back and has failures run a second time. Everything else is what
every run has: topology, agent loop, policy, recorded steps, citations. What the suite came to is read from
the run's record, not from what the agents said.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import orjson

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import PathNotFound, TooLarge, UnknownModel
from agentic_flow.core.messages import (
    Completion,
    CompletionRequest,
    JsonObject,
    ModelInfo,
    Part,
    StreamEnd,
    StreamEvent,
    TextPart,
    ToolCallPart,
    ToolResultPart,
    Usage,
)
from agentic_flow.swarm.runs import RunStep

SUITE_MODEL = "test-suite"
PROGRAM = "agentic-flow-python"
"""The name by which the interpreter is on the agents' allow-list."""
FILES_MAX = 400
_GOAL = "Run every test file and say which of them fail:"
_GOAL_CHARS_MAX = 19_000
_SKIPPED = frozenset({"node_modules", "site-packages", "__pycache__", "build", "dist"})
_LINE = re.compile(
    r"^(?P<path>[^\n\[\]]+?): (?P<outcome>passed|failed|empty|broken) \((?P<said>[^\n\[\]]*)\)", re.MULTILINE
)
_NUMBER = re.compile(r"-(\d+)$")

Outcome = Literal["passed", "failed", "empty", "broken"]
"""`empty`: pytest found no tests in it. `broken`: pytest did not come to a verdict on it."""


@dataclass(frozen=True, slots=True)
class Suite:
    """Test files, relative to their folder in POSIX form, and a line of each that is not blank."""

    folder: Path
    lines: Mapping[str, int]

    @property
    def files(self) -> tuple[str, ...]:
        """In order of their names."""
        return tuple(self.lines)

    @property
    def goal(self) -> str:
        """What a team is asked."""
        return "\n".join([_GOAL, *(f"- {path}" for path in self.files)])


@dataclass(frozen=True, slots=True)
class FileRun:
    """One start of pytest on one file, as it was recorded."""

    path: str
    agent: str
    outcome: Outcome
    said: str
    time_s: float


def suite_of(folder: Path, patterns: Sequence[str] = ("test_*.py", "*_test.py")) -> Suite:
    """The test files of a folder.

    Args:
        folder: Where to look, without hidden folders and those of installed packages.
        patterns: Globs of their names.

    Raises:
        PathNotFound: there is none.
        TooLarge: there are more than one goal can name.
    """
    found: dict[str, int] = {}
    for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part in _SKIPPED or part.startswith(".") for part in relative.parts):
            lines = path.read_text("utf-8", errors="replace").splitlines()
            first = next((number for number, line in enumerate(lines, start=1) if line.strip()), None)
            if first is not None:
                found[relative.as_posix()] = first
    if not found:
        raise PathNotFound(
            f"there are no test files ({', '.join(patterns)}) in {str(folder)!r}", hint="name another folder"
        )
    suite = Suite(folder, found)
    if len(found) > FILES_MAX or len(suite.goal) > _GOAL_CHARS_MAX:
        raise TooLarge(
            f"{len(found)} test files in {str(folder)!r} are more than one team can be asked to run",
            hint="name a folder within it, or fewer files with --files",
        )
    return suite


def policy_text() -> str:
    """What agents of such a team may do: read, and start pytest."""
    return (
        '[defaults]\nread = "allow"\nwrite = "deny"\ndestructive = "deny"\n\n[[rules]]\neffect = "allow"\n'
        f'tools = ["shell_run"]\narguments.argv = {{ regex = "^{PROGRAM} -m pytest " }}\n'
        'reason = "the tests of the benchmark"\n'
    )


class SuiteModel:
    """`Completer` of one model, which follows the rules above.

    Args:
        suite: What is to be run.
        agents: Workers of the team, who take shares of the files by their numbers.
    """

    def __init__(self, suite: Suite, agents: int) -> None:
        self._suite = suite
        self._agents = agents

    async def complete(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> Completion:
        """See Completer."""
        parts = self.answer(request)
        has_calls = any(isinstance(part, ToolCallPart) for part in parts)
        return Completion(
            model=SUITE_MODEL,
            provider=SUITE_MODEL,
            parts=parts,
            stop_reason="tool_calls" if has_calls else "end",
            usage=Usage(cost_usd=0.0),
        )

    async def stream(
        self,
        request: CompletionRequest,
        *,
        principal: Principal,
        deadline: Deadline,
        idempotency_key: str | None = None,
    ) -> AsyncIterator[StreamEvent]:
        """See Completer."""
        completion = await self.complete(request, principal=principal, deadline=deadline)
        yield StreamEnd(completion=completion)

    async def resolve(self, model: str | None, *, principal: Principal) -> ModelInfo:
        """See Completer."""
        if model not in (None, SUITE_MODEL):
            raise UnknownModel(f"model {model!r} runs no tests", hint=f"leave it out: it is {SUITE_MODEL!r}")
        return ModelInfo(
            id=SUITE_MODEL, provider=SUITE_MODEL, input_usd_per_mtok=0.0, output_usd_per_mtok=0.0
        )

    async def models(self, *, principal: Principal) -> list[ModelInfo]:
        """See Completer."""
        return [await self.resolve(None, principal=principal)]

    def answer(self, request: CompletionRequest) -> tuple[Part, ...]:
        """The next turn, from the request alone."""
        parts = [part for message in request.messages for part in message.parts]
        user = next(message for message in request.messages if message.role == "user")
        prompt = "".join(part.text for part in user.parts if isinstance(part, TextPart))
        called = [part for part in parts if isinstance(part, ToolCallPart)]
        results = {part.id: part for part in parts if isinstance(part, ToolResultPart)}
        ran = [read_run(call.arguments, results[call.id]) for call in called if call.id in results]
        if "Split it into at most" in prompt:
            return (TextPart(text=self._plan(prompt)),)
        if "Claims with the lines they cite" in prompt:
            return self._review(prompt, ran, bool(called))
        if "Reviewed claims" in prompt:
            return (TextPart(text=self._merged(prompt)),)
        return self._work(prompt, request.agent or "", ran, bool(called))

    def _plan(self, prompt: str) -> str:
        tasks_max = int(re.findall(r"Split it into at most (\d+) tasks", prompt)[0])
        shares = _shares(_listed(prompt.partition("Split it into at most")[0]), tasks_max)
        tasks = [{"question": "\n".join([_GOAL, *(f"- {path}" for path in share)])} for share in shares]
        return orjson.dumps({"tasks": tasks}).decode()

    def _work(self, prompt: str, agent: str, ran: list[FileRun], has_called: bool) -> tuple[Part, ...]:
        question, _, findings = prompt.partition("Your question:")[2].partition("Findings of others")
        heard = _reported(findings)
        if not has_called:
            files = self._own(_listed(question), agent, heard)
            if files:
                return _calls(files)
        known = heard | {run.path: (run.outcome, run.said) for run in ran}
        return (TextPart(text=self._report(known) or "There were no files to run."),)

    def _own(self, listed: Sequence[str], agent: str, heard: Mapping[str, tuple[str, str]]) -> Sequence[str]:
        """The files that this agent runs now: its task's, its share, or its neighbour's failures."""
        number = int(found[1]) if (found := _NUMBER.search(agent)) else 1
        if tuple(listed) != self._suite.files:  # a task of a plan
            return listed
        shares = _shares(listed, self._agents)
        if not agent.startswith("peer-") or not heard:
            return shares[(number - 1) % len(shares)] if number <= len(shares) else ()
        return [path for path in shares[number % len(shares)] if heard.get(path, ("",))[0] == "failed"]

    def _review(self, prompt: str, ran: list[FileRun], has_called: bool) -> tuple[Part, ...]:
        """Failures are run once more: one that does not come again is none that can be claimed."""
        claimed = {
            int(number): line
            for number, text in re.findall(r"^Claim (\d+): (.*)$", prompt, re.MULTILINE)
            if (line := _LINE.match(text))
        }
        failed = list(dict.fromkeys(c["path"] for c in claimed.values() if c["outcome"] == "failed"))
        if failed and not has_called:
            return _calls(failed)
        again = {run.path: run for run in ran}
        verdicts: list[JsonObject] = []
        for number, claim in claimed.items():
            run = again.get(claim["path"])
            same = run is None or run.outcome == claim["outcome"]
            reason = "reported by its agent" if run is None else f"run again: {run.outcome}"
            verdicts.append({"claim": number, "supported": same, "reason": reason})
        return (TextPart(text=orjson.dumps({"verdicts": verdicts}).decode()),)

    def _merged(self, prompt: str) -> str:
        claims = prompt.partition("Reviewed claims")[2]
        said = re.sub(r"^- \([^)\n]*\) ", "", claims, flags=re.MULTILINE)
        return self._report(_reported(said))

    def _report(self, known: Mapping[str, tuple[str, str]]) -> str:
        return "\n".join(
            f"{path}: {outcome} ({said}) [{path}:{self._suite.lines[path]}-{self._suite.lines[path]}]"
            for path, (outcome, said) in sorted(known.items())
            if path in self._suite.lines
        )


# ---- reading what was run --------------------------------------------------------------------------------


def read_run(arguments: Mapping[str, Any], result: ToolResultPart, agent: str = "") -> FileRun:
    """One call of `shell_run` and its result."""
    content: JsonObject = orjson.loads(result.content)
    return _read(arguments, content, agent, is_error=result.is_error)


def runs_of(steps: Iterable[RunStep]) -> list[FileRun]:
    """Every start of pytest in a run's record, by time."""
    waiting: dict[str, list[Mapping[str, Any]]] = {}
    found: list[tuple[float, FileRun]] = []
    for step in sorted(steps, key=lambda step: (step.agent, step.index)):
        if step.name == "model" and step.output:
            parts = Completion.from_record(step.output).parts
            waiting[step.agent] = [part.arguments for part in parts if isinstance(part, ToolCallPart)]
        elif step.name == "tool:shell_run" and waiting.get(step.agent):
            arguments = waiting[step.agent].pop(0)
            output = step.output or {}
            run = _read(
                arguments,
                output.get("content") or {},
                step.agent,
                is_error=bool(output.get("is_error", True)),
            )
            found.append((step.started_at_s or step.completed_at_s or 0.0, run))
    return [run for _, run in sorted(found, key=lambda each: each[0])]


def _read(arguments: Mapping[str, Any], content: Mapping[str, Any], agent: str, *, is_error: bool) -> FileRun:
    path = str(PurePosixPath(list(arguments["argv"])[-1]))
    time_s = float(content.get("duration_s") or 0.0)
    if is_error:
        return FileRun(path, agent, "broken", _plain(str(content.get("detail") or "no result")), time_s)
    if content.get("timed_out"):
        return FileRun(path, agent, "broken", f"no end after {time_s:g} s", time_s)
    outcomes: dict[Any, Outcome] = {0: "passed", 1: "failed", 5: "empty"}
    outcome = outcomes.get(content.get("exit_code"), "broken")
    lines = [line for line in str(content.get("stdout") or "").splitlines() if line.strip()]
    if outcome == "broken" and not lines:
        lines = str(content.get("stderr") or "").splitlines()[-1:]
    ended = content.get("signal") or f"exit code {content.get('exit_code')}"
    return FileRun(path, agent, outcome, _plain(lines[-1]) if lines else str(ended), time_s)


def _plain(text: str) -> str:
    """A line that can stand in a claim: no brackets, which are citations, and not without end."""
    return re.sub(r"[\[\]()=]", "", text).strip()[:200]


def command_of(path: str) -> list[str]:
    """How a file is run: no plug-in writes beside it, one line at the end says what came of it."""
    return [PROGRAM, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--color=no", path]


def _calls(files: Sequence[str]) -> tuple[Part, ...]:
    return tuple(
        ToolCallPart(id=f"run_{number}", name="shell_run", arguments={"argv": command_of(path)})
        for number, path in enumerate(files, start=1)
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"^- (.+)$", text, re.MULTILINE))


def _reported(text: str) -> dict[str, tuple[str, str]]:
    return {line["path"]: (line["outcome"], line["said"]) for line in _LINE.finditer(text)}


def _shares(files: Sequence[str], number: int) -> list[Sequence[str]]:
    """The files in at most `number` shares whose sizes differ by one at most."""
    return [files[start::number] for start in range(min(number, len(files)))]
