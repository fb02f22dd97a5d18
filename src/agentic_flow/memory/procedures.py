"""From several runs that did alike things, the procedure behind them: what is the same stays, what differs
becomes a hole. Pure functions.

Places that differ in step with each other (the file that is read is the file that is written) get one hole,
the least general generalisation of G. Plotkin, "A note on inductive generalization" (1970). Where a hole's
value came from in every run, the task or what an earlier step observed, is kept with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import orjson
from pydantic import Field

from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.messages import Frozen, JsonObject, Record
from agentic_flow.core.redaction import redact
from agentic_flow.memory.records import Trajectory

STEPS_MAX = 12
"""Tool calls of a procedure; longer runs are not taken for one."""

ACTION_CHARS_MAX = 2_000
OBSERVATION_CHARS_MAX = 400
TASK_CHARS_MAX = 1_000
HOLES_MAX = 16
EXAMPLES_MAX = 3
EXAMPLE_CHARS_MAX = 80

_REDACTED = "[redacted: "
_TOOL = "tool:"
_WHOLE = ""
"""Name of the one argument of an action that is plain text."""

_TOKEN = re.compile(r"\s+|[/.,:;=()\"'\[\]{}<>|&]|[^\s/.,:;=()\"'\[\]{}<>|&]+")
_WORD = re.compile(r"[^\W_]+")
_NOT_NAME = re.compile(r"\W+")
_SPACES = re.compile(r"\s+")

HoleSource = Literal["task", "observation", "secret", "varies"]
"""Where a value came from in every run; `secret`: it looked like one and was not kept."""


class TraceStep(Record):
    """One tool call of a run."""

    tool: str
    action: str = ""
    observation: str = ""


class Trace(Record):
    """The tool calls of one successful run, without those that failed. Secrets are masked."""

    trajectory_id: str
    task: str
    steps: tuple[TraceStep, ...]
    at_s: float = 0.0

    @property
    def tools(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(step.tool for step in self.steps)


class Piece(Record):
    """Fixed text, or a hole by its name."""

    text: str = ""
    hole: str | None = None


class Argument(Record):
    """An argument of a step. `kind` text: its pieces are joined; json: one fixed value, or a hole for one."""

    name: str
    kind: Literal["text", "json"] = "text"
    pieces: tuple[Piece, ...]


class ProcedureStep(Record):
    """One tool call with holes. Arguments that only some runs gave are left out, and named."""

    tool: str
    arguments: tuple[Argument, ...] = ()
    optional: tuple[str, ...] = ()


class Hole(Record):
    """What has to be filled in, and where runs had it from: `step` (from 1) is whose observation it was."""

    name: str
    source: HoleSource = "varies"
    step: int | None = None
    examples: tuple[str, ...] = ()


class Procedure(Record):
    """Steps with holes; `task` is what the tasks have in common, with the same holes."""

    task: tuple[Piece, ...]
    steps: tuple[ProcedureStep, ...]
    holes: tuple[Hole, ...] = ()

    def same_as(self, other: Procedure) -> bool:
        """Whether it does the same: examples of values do not matter."""
        return _bare(self) == _bare(other)


class FilledStep(Frozen):
    """A tool call to make: `arguments`, or `text` where the tool takes plain text.

    `pending` are holes that are filled from what an earlier step (from 1) observes; they stand as `{name}`.
    """

    tool: str
    arguments: JsonObject = Field(default_factory=dict[str, Any])
    text: str | None = None
    pending: dict[str, int] = Field(default_factory=dict[str, int])


def trace_of(trajectory: Trajectory) -> Trace | None:
    """The tool calls of a run that went through; None when there are none, or too many for a procedure.

    Steps count as tool calls by their name (`tool:NAME`) or by having an action; model calls do not.
    """
    steps: list[TraceStep] = []
    for step in trajectory.steps:
        if step.error is not None or step.name == "model":
            continue
        if not step.name.startswith(_TOOL) and not step.action:
            continue
        if len(step.action) > ACTION_CHARS_MAX:
            return None
        steps.append(
            TraceStep(
                tool=step.name.removeprefix(_TOOL)[:100],
                action=redact(step.action),
                observation=redact(step.observation[:OBSERVATION_CHARS_MAX]),
            )
        )
    if not steps or len(steps) > STEPS_MAX or trajectory.steps_total > len(trajectory.steps):
        return None
    return Trace(
        trajectory_id=trajectory.id,
        task=redact(trajectory.task[:TASK_CHARS_MAX]),
        steps=tuple(steps),
        at_s=trajectory.ended_at_s or trajectory.started_at_s,
    )


def likeness(task: str, other: str) -> float:
    """Share of the words of two tasks that both have, 0 to 1."""
    ours, theirs = _task_words(task), _task_words(other)
    return len(ours & theirs) / len(ours | theirs) if ours or theirs else 0.0


@lru_cache(maxsize=1024)
def _task_words(task: str) -> frozenset[str]:
    """A task is compared with many others, one after the other."""
    return frozenset(map(str.casefold, _WORD.findall(task)))


@dataclass(frozen=True, slots=True)
class Generalisation:
    """A procedure, and for each run the values with which it is that run."""

    procedure: Procedure
    values: tuple[dict[str, str], ...]


def generalise(traces: Sequence[Trace]) -> Generalisation | None:
    """The procedure of runs with the same tools in the same order; None if too much of it differs.

    Raises:
        ValueError: there are none, or their tools differ.
    """
    if not traces or any(trace.tools != traces[0].tools for trace in traces):
        raise ValueError("a procedure needs runs with the same tools in the same order")
    holes = _Holes(traces)
    steps = tuple(_step(traces, number, holes) for number in range(len(traces[0].steps)))
    task = _pieces([trace.task for trace in traces], "task", None, holes)
    if len(holes.made) > HOLES_MAX:
        return None
    values = tuple({name: had[run] for name, had in holes.values.items()} for run in range(len(traces)))
    return Generalisation(Procedure(task=task, steps=steps, holes=tuple(holes.made)), values)


class _Holes:
    """The holes of a procedure in the making, by the values that they had in each run."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self._traces = traces
        self._names: dict[tuple[str, ...], str] = {}
        self.made: list[Hole] = []
        self.values: dict[str, tuple[str, ...]] = {}

    def hole(self, values: Sequence[str], wish: str, step: int | None) -> Piece:
        """The hole of these values, one a run; a new one unless there is one already.

        Args:
            values: In each run.
            wish: Name, if it is free.
            step: Number of the step that needs it, from 0; None for the task.
        """
        key = tuple(values)
        name = self._names.get(key)
        if name is None and step is None:
            # A task may write in capitals what the tool is given without.
            folded = [value.casefold() for value in values]
            name = next((n for k, n in self._names.items() if [v.casefold() for v in k] == folded), None)
        if name is None:
            self._names[key] = name = self._free(wish)
            self.values[name] = key
            source, seen_in = self._source(values, step)
            examples = () if source == "secret" else dict.fromkeys(v[:EXAMPLE_CHARS_MAX] for v in values)
            self.made.append(
                Hole(name=name, source=source, step=seen_in, examples=tuple(examples)[:EXAMPLES_MAX])
            )
        return Piece(hole=name)

    def _free(self, wish: str) -> str:
        name = _NOT_NAME.sub("_", wish).strip("_")[:40] or "value"
        taken = {hole.name for hole in self.made}
        number = 1
        while (candidate := name if number == 1 else f"{name}_{number}") in taken:
            number += 1
        return candidate

    def _source(self, values: Sequence[str], step: int | None) -> tuple[HoleSource, int | None]:
        if any(_REDACTED in value for value in values):
            return "secret", None
        if step is None or all(
            _within(value, trace.task) for value, trace in zip(values, self._traces, strict=True)
        ):
            return "task", None
        for earlier in range(step):
            observed = (trace.steps[earlier].observation for trace in self._traces)
            if all(_within(value, text) for value, text in zip(values, observed, strict=True)):
                return "observation", earlier + 1
        return "varies", None


def _within(value: str, text: str) -> bool:
    """Whether the text has the value, not inside of a longer word."""
    value = value.strip()
    if not value:
        return False
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def _step(traces: Sequence[Trace], number: int, holes: _Holes) -> ProcedureStep:
    actions = [trace.steps[number].action for trace in traces]
    tool = traces[0].steps[number].tool
    objects = [_json_object(action) for action in actions]
    if any(given is None for given in objects):
        if not any(actions):
            return ProcedureStep(tool=tool)
        return ProcedureStep(
            tool=tool, arguments=(Argument(name=_WHOLE, pieces=_pieces(actions, tool, number, holes)),)
        )
    given = [one for one in objects if one is not None]
    shared = [name for name in given[0] if all(name in one for one in given)]
    everywhere = set(shared)
    return ProcedureStep(
        tool=tool,
        arguments=tuple(_argument(name, [one[name] for one in given], number, holes) for name in shared),
        optional=tuple(sorted({name for one in given for name in one} - everywhere)),
    )


def _argument(name: str, values: Sequence[object], number: int, holes: _Holes) -> Argument:
    if all(isinstance(value, str) for value in values):
        return Argument(name=name, pieces=_pieces(cast(Sequence[str], values), name, number, holes))
    written = [_json(value) for value in values]
    if len(set(written)) == 1 and _REDACTED not in written[0]:
        return Argument(name=name, kind="json", pieces=(Piece(text=written[0]),))
    return Argument(name=name, kind="json", pieces=(holes.hole(written, name, number),))


def _pieces(values: Sequence[str], wish: str, step: int | None, holes: _Holes) -> tuple[Piece, ...]:
    """What the texts have in common, with holes where they differ."""
    if any(_REDACTED in value for value in values):
        return (holes.hole(values, wish, step),)
    if len(set(values)) == 1:
        return (Piece(text=values[0]),)
    tokens = [_TOKEN.findall(value) for value in values]
    columns = _columns(tokens)
    pieces: list[Piece] = []
    fixed = ""
    for column in columns:
        if len(set(column)) == 1:
            fixed += column[0]
            continue
        if fixed:
            pieces.append(Piece(text=fixed))
            fixed = ""
        pieces.append(holes.hole(column, wish, step))
    return (*pieces, Piece(text=fixed)) if fixed else tuple(pieces)


def _columns(tokens: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Tokens of all texts side by side. Texts of unlike shape share their beginning and end, no more."""
    shapes = {tuple(_TOKEN_KINDS.sub("w", token) for token in text) for text in tokens}
    if len(shapes) == 1:
        return _joined(list(zip(*tokens, strict=True)))
    shortest = min(len(text) for text in tokens)
    first = 0
    while first < shortest and len({text[first] for text in tokens}) == 1:
        first += 1
    last = 0
    while last < shortest - first and len({text[-1 - last] for text in tokens}) == 1:
        last += 1
    middle = tuple("".join(text[first : len(text) - last]) for text in tokens)
    return [
        *zip(*(text[:first] for text in tokens), strict=True),
        middle,
        *zip(*(text[len(text) - last :] for text in tokens), strict=True),
    ]


def _joined(columns: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Columns with the parts of one name or path that all differ put together: `a.txt`, `b.md`."""
    joined: list[tuple[str, ...]] = []
    for column in columns:
        differs = len(set(column)) > 1
        if differs and len(joined) > 1 and joined[-1][0] in _WITHIN_NAMES and len(set(joined[-2])) > 1:
            between = joined.pop()
            column = tuple(map("".join, zip(joined.pop(), between, column, strict=True)))
        joined.append(column)
    return joined


_WITHIN_NAMES = frozenset("/.:")
_TOKEN_KINDS = re.compile(r"^[^\s/.,:;=()\"'\[\]{}<>|&]+$")


def fill(procedure: Procedure, parameters: Mapping[str, object]) -> list[FilledStep]:
    """The tool calls with the holes filled.

    Args:
        procedure: What to do.
        parameters: Values by hole. Those that are taken from an observation may be missing.

    Raises:
        InvalidInput: a value is missing, or is for no hole.
    """
    known = {hole.name: hole for hole in procedure.holes}
    if unknown := sorted(set(parameters) - set(known)):
        raise InvalidInput(
            f"{unknown[0]!r} is no hole of this procedure", hint=f"it has {sorted(known) or 'none'}"
        )
    return [_filled(step, known, parameters) for step in procedure.steps]


def _filled(step: ProcedureStep, known: Mapping[str, Hole], given: Mapping[str, object]) -> FilledStep:
    pending: dict[str, int] = {}

    def value(name: str) -> object:
        if name in given:
            return given[name]
        hole = known[name]
        if hole.step is None:
            raise InvalidInput(
                f"the procedure needs a value for {name!r}",
                hint=f"values so far: {', '.join(hole.examples) or 'none kept'}",
            )
        pending[name] = hole.step
        return f"{{{name}}}"

    def text(pieces: Sequence[Piece]) -> str:
        return "".join(piece.text if piece.hole is None else _text(value(piece.hole)) for piece in pieces)

    if [argument.name for argument in step.arguments] == [_WHOLE]:
        return FilledStep(tool=step.tool, text=text(step.arguments[0].pieces), pending=pending)
    arguments: JsonObject = {}
    for argument in step.arguments:
        first = argument.pieces[0] if argument.pieces else Piece()
        if argument.kind == "text":
            arguments[argument.name] = text(argument.pieces)
        else:
            arguments[argument.name] = _value(first.text if first.hole is None else value(first.hole))
    return FilledStep(tool=step.tool, arguments=arguments, pending=pending)


def read_task(procedure: Procedure, task: str) -> dict[str, str] | None:
    """Values of the holes that a task names, or None when it has not the form of the procedure's tasks.

    A value ends where the fixed text behind it begins first.
    """
    return read_form(procedure.task, task)


def read_form(form: Sequence[Piece], task: str) -> dict[str, str] | None:
    """`read_task` of the form that a procedure's tasks have."""
    rest = " ".join(task.split())
    texts = [_SPACES.sub(" ", piece.text) for piece in form]
    texts[0], texts[-1] = texts[0].lstrip(), texts[-1].rstrip()
    values: dict[str, str] = {}
    for number, piece in enumerate(form):
        if piece.hole is None:
            fixed = texts[number]
            if rest[: len(fixed)].casefold() != fixed.casefold():
                return None
            rest = rest[len(fixed) :]
            continue
        end = len(rest)
        if number + 1 < len(texts):
            behind = re.escape(texts[number + 1]) + ("$" if number + 2 == len(texts) else "")
            starts = (match.start() for match in re.finditer(behind, rest, re.IGNORECASE))
            end = next((start for start in starts if start > 0), 0)
        value, rest = rest[:end], rest[end:]
        if not value or values.setdefault(piece.hole, value).casefold() != value.casefold():
            return None
    return None if rest else values


def shown(pieces: Sequence[Piece]) -> str:
    """Pieces as one line, holes as `{name}`."""
    return "".join(piece.text if piece.hole is None else f"{{{piece.hole}}}" for piece in pieces)


def written(procedure: Procedure) -> str:
    """The procedure for a reader: numbered steps, then what the holes are."""
    lines: list[str] = []
    for number, step in enumerate(procedure.steps, 1):
        arguments = ", ".join(
            shown(argument.pieces) if argument.name == _WHOLE else f"{argument.name}={shown(argument.pieces)}"
            for argument in step.arguments
        )
        lines.append(f"{number}. {step.tool}({arguments})")
    origins = {"task": "from the task", "secret": "a secret, ask for it", "varies": "it differed each time"}
    for hole in procedure.holes:
        origin = origins.get(hole.source, f"from what step {hole.step} returned")
        examples = f", like {', '.join(hole.examples)}" if hole.examples else ""
        lines.append(f"{{{hole.name}}}: {origin}{examples}")
    return "\n".join(lines)


def _bare(procedure: Procedure) -> Procedure:
    holes = tuple(hole.model_copy(update={"examples": ()}) for hole in procedure.holes)
    return procedure.model_copy(update={"holes": holes})


def _text(value: object) -> str:
    return value if isinstance(value, str) else _json(value)


def _value(given: object) -> object:
    """A value for a place that held something else than text in the runs."""
    if not isinstance(given, str):
        return given
    try:
        return orjson.loads(given)
    except orjson.JSONDecodeError:
        return given


def _json(value: object) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _json_object(text: str) -> JsonObject | None:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return cast(JsonObject, value) if isinstance(value, dict) else None
