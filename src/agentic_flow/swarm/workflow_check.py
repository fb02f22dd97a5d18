"""The check of a workflow before it runs: every problem at once, with its place, its line and a remedy."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic import ValidationError

from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.admission import check_spec as check_run
from agentic_flow.swarm.artifact_files import check_pattern
from agentic_flow.swarm.delegation import TOOLS as DELEGATION_TOOLS
from agentic_flow.swarm.workflow_file import Document, Format, Place, parse_document
from agentic_flow.swarm.workflow_spec import (
    RESERVED,
    STEPS_MAX,
    InputSpec,
    Problem,
    Step,
    Surroundings,
    WorkflowSpec,
    fits,
)
from agentic_flow.swarm.workflow_text import Reference, Template, expression, is_template, template

_OURS = (
    "inputs",
    "paths_allowed",
    "paths_forbidden",
    "budget_usd",
    "deadline_s",
    "tokens_max",
    "refines",
    "queue",
    "priority",
    "after",
    "after_any_end",
)
"""Fields of a run that, within a workflow, are the workflow's."""
_LATER = ("approve", "ask", "schedule", "signal", "wait", "sleep", "cron", "question")
_ONE = {"team": "a team", "wait_for": "a wait"}
_PROBLEMS_MAX = 200
_LIMITS = ("steps_max", "tool_calls_max", "output_tokens_max")
_AGENT_FIELDS = ("text", "citations", "model", "truncated")
_TEAM_FIELDS = ("answer", "citations", "run_id", "topology")
_APPROVAL_FIELDS = ("answer", "by", "timed_out")
_SIGNAL_FIELDS = ("value", "by", "timed_out")


def check_text(
    text: str, written: Format, around: Surroundings | None = None
) -> tuple[WorkflowSpec | None, list[Problem]]:
    """The workflow that a text describes, and what is wrong with it; None when it cannot be used at all.

    Args:
        text: Of a file.
        written: Its format.
        around: What it may name; None: only what the text itself tells is checked.
    """
    try:
        document = parse_document(text, written)
    except AgenticFlowError as error:
        return None, [Problem(path="", message=error.message, hint=error.hint or "correct it")]
    return check_document(document, around)


def check_document(
    document: Document, around: Surroundings | None = None
) -> tuple[WorkflowSpec | None, list[Problem]]:
    """As `check_text`, of data."""
    check = _Check(document, around)
    spec = check.read()
    check.all()
    ordered = sorted(check.problems, key=lambda problem: (problem.line or 0,))
    return (spec if not ordered else None), ordered[:_PROBLEMS_MAX]


def check_spec(spec: WorkflowSpec, around: Surroundings | None = None) -> list[Problem]:
    """What is wrong with a workflow that was made in Python."""
    return check_document(Document(spec.model_dump(mode="json", exclude_unset=True), {}), around)[1]


@dataclass
class _Check:
    """One check: what could be read of the document, and the problems so far."""

    document: Document
    around: Surroundings | None
    problems: list[Problem] = field(default_factory=list[Problem])
    spec: WorkflowSpec | None = None
    steps: dict[int, Step] = field(default_factory=dict[int, Step])
    ids: dict[str, int] = field(default_factory=dict[str, int])
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    inputs: dict[str, InputSpec | None] = field(default_factory=dict[str, "InputSpec | None"])

    def say(self, place: Place, message: str, hint: str) -> None:
        """Note a problem."""
        path = ".".join(str(part) for part in place)
        self.problems.append(Problem(path=path, line=self.document.line(place), message=message, hint=hint))

    # ---- reading -----------------------------------------------------------------------------------------

    def read(self) -> WorkflowSpec | None:
        """Read what can be read: a step that is wrong does not hide what is wrong with the others."""
        data = self.document.data
        raw_steps: Any = data.get("steps")
        entries = cast(list[Any], raw_steps) if isinstance(raw_steps, list) else []
        if len(entries) > STEPS_MAX:
            self.say(("steps",), f"there are {len(entries)} steps", f"the limit is {STEPS_MAX}")
            return None
        for index, entry in enumerate(entries):
            self._read_step(index, entry)
        declared: Any = data.get("inputs")
        if isinstance(declared, dict):
            for name, value in cast(dict[str, Any], declared).items():
                try:
                    self.inputs[name] = InputSpec.model_validate(value)
                except ValidationError:  # told below, with the whole
                    self.inputs[name] = None
        try:
            self.spec = WorkflowSpec.model_validate(data)
        except ValidationError as error:
            self._tell(error)
        return self.spec

    def _read_step(self, index: int, entry: Any) -> None:
        try:
            step = Step.model_validate(entry)
        except ValidationError:
            if isinstance(entry, dict):
                self._read_names(index, cast(dict[str, Any], entry))
            return
        self.steps[index] = step
        self._named(index, step.id)
        self.needs.setdefault(step.id, step.needs)

    def _read_names(self, index: int, entry: dict[str, Any]) -> None:
        """Of a step that is wrong: its id and its needs, so that others may name it."""
        name: Any = entry.get("id")
        if isinstance(name, str):
            self._named(index, name)
            raw: Any = entry.get("needs")
            listed = cast(list[Any], raw) if isinstance(raw, list) else []
            self.needs.setdefault(name, tuple(need for need in listed if isinstance(need, str)))

    def _named(self, index: int, name: str) -> None:
        if name in self.ids:
            first = self.ids[name]
            self.say(("steps", index, "id"), f"{name!r} is the id of steps.{first} too", "rename one")
        else:
            self.ids[name] = index

    def _tell(self, error: ValidationError) -> None:
        seen = Counter[Place]()
        for one in error.errors():
            place = one["loc"]
            seen[place] += 1
            if seen[place] > 1:
                continue
            value = one["input"]
            if one["type"] == "too_short" and isinstance(value, list) and value:
                continue  # there are entries; each that is wrong is told by itself
            if one["type"] == "extra_forbidden":
                self._unknown_key(place)
            elif one["type"] == "missing":
                self.say(place, f"{place[-1]!r} is missing", "add it")
            else:
                shown = "" if isinstance(value, dict | list) else f": {value!r}"
                said = one["msg"].removeprefix("Value error, ")
                self.say(place, f"{said[:300]}{shown[:120]}", "see the guide to workflows")

    def _unknown_key(self, place: Place) -> None:
        key = str(place[-1])
        if key in _LATER:
            self.say(
                place,
                f"{key!r} is not offered: workflows have approvals, wait_for and a schedule as a whole",
                "take it out; where somebody must decide, use `approval`, and for events `wait_for`",
            )
            return
        close = difflib.get_close_matches(key, _keys_at(place), n=1)
        self.say(
            place, f"there is no {key!r} here", f"did you mean {close[0]!r}?" if close else "take it out"
        )

    # ---- the graph ---------------------------------------------------------------------------------------

    def all(self) -> None:
        """Every check of what could be read."""
        self._needs()
        cycle = find_cycle(self.needs)
        if cycle:
            place = ("steps", self.ids[cycle[0]], "needs")
            self.say(
                place, f"the steps wait for each other: {' → '.join(cycle)}", "take one of the needs out"
            )
        fallbacks = self._fallbacks()
        self._inputs()
        for index, step in self.steps.items():
            self._team_fields(index, step)
            self._artifacts(index, step)
            if self.around is not None:
                self._names(index, step, self.around)
        if not cycle:
            self._references(fallbacks)
        if self.around is not None:
            self._model(("model",), self.spec.model if self.spec else None, self.around)
            self._limit(("tokens_max",), self.spec.tokens_max if self.spec else None, self.around)
            self._limit(("deadline_s",), self.spec.deadline_s if self.spec else None, self.around)

    def _needs(self) -> None:
        for name, needs in self.needs.items():
            place = ("steps", self.ids[name], "needs")
            for need in needs:
                if need not in self.ids:
                    self.say(place, f"there is no step {need!r}", _closest(need, self.ids))
            for need, times in Counter(needs).items():
                if times > 1:
                    self.say(place, f"{need!r} is needed twice", "once is enough")

    def _fallbacks(self) -> dict[str, str]:
        """Fallback → its owner."""
        found: dict[str, str] = {}
        for index, step in self.steps.items():
            target, place = step.fallback, ("steps", index, "fallback")
            if target is None:
                continue
            if target not in self.ids:
                self.say(place, f"there is no step {target!r}", _closest(target, self.ids))
            elif target == step.id or target in found:
                self.say(place, f"{target!r} cannot be the fallback of {step.id!r}", "name a step of its own")
            else:
                found[target] = step.id
        for target, owner in found.items():
            self._fallback(target, owner)
            for name, needs in self.needs.items():
                if target in needs:
                    place = ("steps", self.ids[name], "needs")
                    hint = f"need {owner!r}: the fallback's output stands as its"
                    self.say(place, f"{target!r} is the fallback of {owner!r}", hint)
        return found

    def _fallback(self, target: str, owner: str) -> None:
        index = self.ids[target]
        step = self.steps.get(index)
        if step is None:
            return
        for key, is_set in (
            ("needs", bool(step.needs)),
            ("when", step.when is not None),
            ("fan_out", step.fan_out is not None),
            ("on_failure", step.on_failure != "fail"),
        ):
            if is_set:
                what = f"a fallback has no {key}: it runs when {owner!r} has failed"
                self.say(("steps", index, key), what, "take it out")
        owning = self.steps.get(self.ids[owner])
        if owning is not None and owning.fan_out is not None:
            hint = 'take on_failure = "continue", which leaves null in the place of a failed item'
            self.say(("steps", self.ids[owner], "fallback"), "a fan-out has no fallback", hint)

    def _inputs(self) -> None:
        for name, declared in self.inputs.items():
            if name in RESERVED:
                self.say(("inputs", name), f"{name!r} has a meaning of its own", "rename it")
            if declared is None or declared.required or declared.default is None:
                continue
            if not fits(declared.type, declared.default):
                what = f"the default {declared.default!r} is no {declared.type}"
                self.say(("inputs", name, "default"), what[:300], "give one of its type")

    # ---- what is named -----------------------------------------------------------------------------------

    def _team_fields(self, index: int, step: Step) -> None:
        if step.team is not None:
            for name in _OURS:
                if name in step.team.model_fields_set:
                    what = f"{name!r} holds for the whole workflow"
                    self.say(("steps", index, "team", name), what, "set it there, not for one team")

    def _artifacts(self, index: int, step: Step) -> None:
        if step.artifacts and not self.document.data.get("folders"):
            place = ("steps", index, "artifacts")
            self.say(place, "the workflow has no folder to keep files of", "name it in `folders`")
        for number, pattern in enumerate(step.artifacts):
            try:
                check_pattern(pattern)
            except InvalidInput as error:
                self.say(("steps", index, "artifacts", number), error.message, error.hint or "correct it")

    def _names(self, index: int, step: Step, around: Surroundings) -> None:
        place: Place = ("steps", index, step.kind)
        if step.tool is not None:
            self._tool(place, step.tool.name, step.tool.arguments, around)
        elif step.agent is not None:
            agent = step.agent
            if agent.definition is not None and agent.definition not in around.agents:
                hint = _closest(agent.definition, around.agents)
                self.say((*place, "definition"), f"there is no agent {agent.definition!r}", hint)
            self._tools((*place, "tools"), agent.tools or (), around)
            self._model((*place, "model"), agent.model, around)
            for name in _LIMITS:
                self._limit((*place, name), getattr(agent, name), around)
        elif step.team is not None:
            self._team(place, step, around)

    def _team(self, place: Place, step: Step, around: Surroundings) -> None:
        team = step.team
        assert team is not None
        self._model((*place, "model"), team.model, around)
        try:
            check_run(team, around.settings)
        except InvalidInput as error:
            self.say(place, error.message, error.hint or "correct it")
        for role, choice in team.roles.items():
            here = (*place, "roles", role)
            if choice.agent is not None and choice.agent not in around.agents:
                hint = _closest(choice.agent, around.agents)
                self.say((*here, "agent"), f"there is no agent {choice.agent!r}", hint)
            self._tools((*here, "tools"), choice.tools or (), around)
            self._model((*here, "model"), choice.model, around)
        for number, stage in enumerate(team.stages):
            if stage.agent not in around.agents:
                hint = _closest(stage.agent, around.agents)
                here = (*place, "stages", number, "agent")
                self.say(here, f"there is no agent {stage.agent!r}", hint)

    def _tool(self, place: Place, name: str, arguments: Mapping[str, Any], around: Surroundings) -> None:
        schema = around.tools.get(name)
        if schema is None:
            what = f"there is no tool {name!r}, or it is not permitted"
            self.say((*place, "name"), what, _closest(name, around.tools))
            return
        known: Mapping[str, Any] = schema.get("properties") or {}
        if schema.get("additionalProperties", True) is False:
            for argument in arguments:
                if argument not in known:
                    here = (*place, "arguments", argument)
                    self.say(here, f"{name!r} takes no argument {argument!r}", _closest(argument, known))
        for argument in schema.get("required") or ():
            if argument not in arguments:
                what = f"{name!r} needs the argument {argument!r}"
                self.say((*place, "arguments"), what, "add it")

    def _tools(self, place: Place, names: Sequence[str], around: Surroundings) -> None:
        known = {*around.tools, *DELEGATION_TOOLS}
        for number, name in enumerate(names):
            if name not in known:
                what = f"there is no tool {name!r}, or it is not permitted"
                self.say((*place, number), what, _closest(name, known))

    def _model(self, place: Place, name: str | None, around: Surroundings) -> None:
        if name is not None and name in around.refused_models:
            hint = "list what there is with `agentic-flow models list`"
            self.say(place, around.refused_models[name], hint)

    def _limit(self, place: Place, value: float | None, around: Surroundings) -> None:
        most = _most(around.settings, str(place[-1]))
        if value is not None and value > most:
            what = f"{place[-1]} {value!r} is above what the settings allow"
            self.say(place, what, f"ask for {most:g} at most, or have the operator raise it")

    # ---- templates ---------------------------------------------------------------------------------------

    def _references(self, fallbacks: Mapping[str, str]) -> None:
        graph = _Graph(self.steps, self.ids, self.needs, fallbacks)
        for index, step in self.steps.items():
            for place, source, bare in _sources(step):
                found = self._template(("steps", index, *place), source, bare=bare)
                if found is None:
                    continue
                at_item = step.fan_out is not None and place not in (("fan_out", "over"), ("when",))
                for reference in found.references:
                    self._reference(("steps", index, *place), reference, graph, step, at_item=at_item)
                if place == ("fan_out", "over"):
                    self._over(("steps", index, *place), found, graph)
        data = self.document.data
        for place, source in _texts(data.get("outputs"), ("outputs",)):
            found = self._template(place, source)
            for reference in found.references if found else ():
                self._reference(place, reference, graph, None)
        for place, source in _texts(data.get("folders"), ("folders",)):
            found = self._template(place, source)
            for reference in found.references if found else ():
                if reference.path[0] != "inputs":
                    self.say(place, f"{'.'.join(reference.path)!r} is not known yet", "use inputs only")
                else:
                    self._input(place, reference)

    def _template(self, place: Place, source: str, *, bare: bool = False) -> Template | None:
        try:
            return expression(source) if bare else template(source)
        except InvalidInput as error:
            self.say(place, error.message, error.hint or "correct it")
            return None

    def _reference(
        self, place: Place, reference: Reference, graph: _Graph, step: Step | None, *, at_item: bool = False
    ) -> None:
        path = reference.path
        match path[0]:
            case "inputs":
                self._input(place, reference)
            case "steps":
                self._output(place, reference, graph, step)
            case "item" | "index" if at_item:
                pass
            case "item" | "index":
                self.say(place, f"{path[0]!r} is known in the work of a fan_out only", "add one, or rename")
            case name:
                known = ["inputs", "steps", *(["item", "index"] if at_item else [])]
                self.say(place, f"nothing is called {name!r}", f"there are {', '.join(known)}")

    def _input(self, place: Place, reference: Reference) -> None:
        path = reference.path
        if len(path) == 1:
            return
        if path[1] not in self.inputs:
            self.say(place, f"there is no input {path[1]!r}", _closest(path[1], self.inputs))
            return
        declared = self.inputs[path[1]]
        if declared is not None and len(path) > 2 and declared.type not in ("object", "list"):
            self.say(place, f"the input {path[1]!r} is a {declared.type} without parts", "take it whole")

    def _output(self, place: Place, reference: Reference, graph: _Graph, step: Step | None) -> None:
        path = reference.path
        if len(path) < 3:
            self.say(place, "a step is named without what of it", "write steps.ID.output, .state or .error")
            return
        name, what = path[1], path[2]
        if name not in self.ids:
            self.say(place, f"there is no step {name!r}", _closest(name, self.ids))
            return
        if what not in ("output", "state", "error"):
            self.say(place, f"a step has no {what!r}", "write steps.ID.output, .state or .error")
            return
        if name in graph.fallbacks:
            owner = graph.fallbacks[name]
            hint = f"write steps.{owner}.{what}: the fallback's output stands as its"
            self.say(place, f"{name!r} is the fallback of {owner!r}", hint)
            return
        if step is not None and name not in graph.before(step.id):
            hint = f"add {name!r} to the needs of {step.id!r}"
            self.say(place, f"{step.id!r} does not wait for {name!r}", hint)
            return
        if what != "state" and not reference.guarded and not graph.sure(name, what, step):
            hint = f"write `steps.{name}.{what} | default(…)`, or need it"
            self.say(place, f"{name!r} may have no {what} by then", hint)
            return
        self._part(place, path, graph)

    def _part(self, place: Place, path: tuple[str, ...], graph: _Graph) -> None:
        """Fields of outputs whose shape is ours."""
        if path[2] != "output" or len(path) < 4:
            return
        other = graph.step(path[1])
        if other is None or other.fan_out is not None or other.fallback is not None:
            return
        fields = {
            "agent": _AGENT_FIELDS,
            "team": _TEAM_FIELDS,
            "approval": _APPROVAL_FIELDS,
            "wait_for": _SIGNAL_FIELDS,
        }.get(other.kind)
        if fields is not None and path[3] not in fields:
            what = f"the output of {_ONE.get(other.kind, f'an {other.kind}')} has no {path[3]!r}"
            self.say(place, what, f"there are {', '.join(fields)}")

    def _over(self, place: Place, found: Template, graph: _Graph) -> None:
        hint = "give a list: an input of that type, a part of an output, or `… | lines`"
        if found.makes_no_list:
            self.say(place, f"{found.source!r} is no list", hint)
            return
        plain = found.plain
        if plain is None:
            return
        if len(plain) == 2 and plain[0] == "inputs":
            declared = self.inputs.get(plain[1])
            if declared is not None and declared.type != "list":
                self.say(place, f"the input {plain[1]!r} is a {declared.type}, no list", hint)
        elif len(plain) == 1 or (len(plain) == 3 and plain[2] in ("state", "error")):
            self.say(place, f"{found.source!r} is no list", hint)
        elif len(plain) in (3, 4) and plain[0] == "steps":
            other = graph.step(plain[1])
            if other is None or other.fan_out is not None:
                return
            is_text = len(plain) == 4 and plain[3] in ("text", "answer", "model", "run_id", "topology", "by")
            if len(plain) == 3 or (other.kind != "tool" and is_text):
                what = "a text" if is_text else "a table"
                self.say(place, f"{found.source!r} is {what}, no list", hint)


class _Graph:
    """What can be said of steps before they run.

    Args:
        steps: Those that could be read, by their place.
        ids: Id → place, of all.
        needs: Id → needs, without cycles.
        fallbacks: Fallback → the step in whose place it runs.
    """

    def __init__(
        self,
        steps: Mapping[int, Step],
        ids: Mapping[str, int],
        needs: Mapping[str, tuple[str, ...]],
        fallbacks: Mapping[str, str],
    ) -> None:
        self._steps, self._ids = steps, ids
        self.fallbacks = fallbacks
        self._before: dict[str, frozenset[str]] = {}
        self._certain: dict[str, frozenset[str]] = {}
        self._runs: dict[str, bool] = {}
        for name in topological(needs):
            self._add(name, [need for need in needs[name] if need in needs])

    def _add(self, name: str, needs: Sequence[str]) -> None:
        step = self.step(name)
        self._before[name] = frozenset(needs).union(*(self._before[need] for need in needs))
        sets = [self._with(need) for need in needs]
        rule = step.start_when if step is not None else "all"
        if rule == "any" and sets:
            common = set(sets[0])
            for one in sets[1:]:
                common &= one
            self._certain[name] = frozenset(common)
            starts = any(self._completes(need) for need in needs)
        elif rule == "ended":
            self._certain[name] = frozenset()
            starts = True
        else:
            self._certain[name] = frozenset[str]().union(*sets)
            starts = all(self._runs[need] for need in needs)
        self._runs[name] = step is None or (step.when is None and starts)

    def _with(self, need: str) -> frozenset[str]:
        known = self.step(need)
        passes = known is not None and known.on_failure == "continue"
        return self._certain[need] if passes else self._certain[need] | {need}

    def _completes(self, name: str) -> bool:
        known = self.step(name)
        return self._runs[name] and (known is None or known.on_failure != "continue")

    def step(self, name: str) -> Step | None:
        """The step, if it could be read."""
        return self._steps.get(self._ids[name]) if name in self._ids else None

    def before(self, name: str) -> frozenset[str]:
        """Steps that have ended when this one starts."""
        owner = self.fallbacks.get(name)
        return self._before[name] if owner is None else self._before[owner] | {owner}

    def sure(self, name: str, what: str, step: Step | None) -> bool:
        """Whether a step has an output (or an error) whenever `step` starts; None: when all has completed."""
        if what == "error":
            return step is not None and self.fallbacks.get(step.id) == name
        if step is None:
            return self._completes(name)
        return name in self._certain[self.fallbacks.get(step.id, step.id)]


def topological(needs: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Steps, each after those it needs, else in their order. Steps in or behind a cycle are left out."""
    waiting = {name: {need for need in of if need in needs} for name, of in needs.items()}
    dependents: dict[str, list[str]] = {name: [] for name in needs}
    for name, of in waiting.items():
        for need in of:
            dependents[need].append(name)
    ready = [name for name, of in waiting.items() if not of]
    for name in ready:
        yield name
        for dependent in dependents[name]:
            waiting[dependent].discard(name)
            if not waiting[dependent]:
                ready.append(dependent)


def find_cycle(needs: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Steps that wait for each other, the first one again at the end; empty: there are none."""
    left = set(needs) - set(topological(needs))
    if not left:
        return []
    path = [min(left)]
    while True:
        following = next(need for need in needs[path[-1]] if need in left)
        if following in path:
            return [*path[path.index(following) :], following]
        path.append(following)


def _sources(step: Step) -> Iterator[tuple[Place, str, bool]]:
    """Place, text and whether it is a bare expression, of every template of a step."""
    if step.when is not None:
        yield ("when",), step.when, True
    if step.fan_out is not None:
        yield ("fan_out", "over"), step.fan_out.over, True
    if step.agent is not None:
        yield ("agent", "prompt"), step.agent.prompt, False
    if step.team is not None:
        yield ("team", "goal"), step.team.goal, False
    if step.approval is not None:
        yield ("approval", "question"), step.approval.question, False
    if step.tool is not None:
        for place, source in _texts(step.tool.arguments, ("tool", "arguments")):
            yield place, source, False
    yield from ((place, source, False) for place, source in _texts(step.artifacts, ("artifacts",)))


def _texts(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    """Every text with something to fill in, and its place."""
    if isinstance(value, str):
        if is_template(value):
            yield place, value
    elif isinstance(value, Mapping):
        for key, inner in cast(Mapping[str, Any], value).items():
            yield from _texts(inner, (*place, key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(cast(Sequence[Any], value)):
            yield from _texts(inner, (*place, index))


def _most(settings: SwarmSettings, name: str) -> float:
    return settings.run_timeout_s if name == "deadline_s" else getattr(settings, name)


def _closest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(names) == 1:
        return f"there is only {names[0]!r}"
    return f"there are {', '.join(names[:20])}" if names else "there are none"


def _keys_at(place: Place) -> list[str]:
    """Keys that would be understood where an unknown one stands."""
    model: Any = WorkflowSpec
    for part in place[:-1]:
        if isinstance(part, int):
            continue
        model = _MODELS.get(part, model)
    return list(model.model_fields)


def _models() -> dict[str, Any]:
    from agentic_flow.swarm.runs import RunSpec
    from agentic_flow.swarm.schedule_rule import ScheduleRule
    from agentic_flow.swarm.workflow_spec import AgentWork, ApprovalWork, FanOut, Retry, SignalWork, ToolWork

    return {
        "schedule": ScheduleRule,
        "steps": Step,
        "agent": AgentWork,
        "team": RunSpec,
        "tool": ToolWork,
        "approval": ApprovalWork,
        "wait_for": SignalWork,
        "fan_out": FanOut,
        "retry": Retry,
        "inputs": InputSpec,
    }


_MODELS = _models()
