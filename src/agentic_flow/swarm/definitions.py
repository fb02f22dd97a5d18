"""Agent definitions: Markdown files with YAML front matter, as `.claude/agents/*.md` have it.

    ---
    name: reviewer
    description: Checks claims against the lines they cite.
    tools: Read, Grep            # or a list; absent: every tool the run permits
    model: inherit               # or a model's name; absent: the run's
    role: reviewer               # ours: planner, worker, reviewer or synthesizer
    color: blue                  # kept, not used
    ---
    The body is the system prompt.

Reading is strict: whatever is wrong is one line `path:line: what; remedy`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from agentic_flow.core.errors import InvalidInput, NotFound
from agentic_flow.core.messages import Frozen
from agentic_flow.core.settings import Settings
from agentic_flow.swarm.topology import Role

BUILT_IN_DIR = Path(__file__).with_name("builtin_agents")
FILE_MAX_BYTES = 256 * 1024
FILES_MAX = 1000
DESCRIPTION_CHARS_MAX = 8000

TOOL_NAMES = frozenset(
    (
        "artifact_list",
        "artifact_read",
        "artifact_save",
        "artifact_write",
        "board_list",
        "board_read",
        "board_write",
        "delegate",
        "file_edit",
        "file_find",
        "file_info",
        "file_list",
        "file_read",
        "file_search",
        "file_write",
        "handoff",
        "memory_search",
        "reasoning_pattern_get",
        "reasoning_pattern_store",
        "reasoning_retrieve",
        "reasoning_trajectory_list",
        "shell_run",
    )
)
"""Tools that exist here. (A test holds this list against the tools themselves.)"""

CLAUDE_TOOLS = {
    "Read": "file_read",
    "Grep": "file_search",
    "Glob": "file_find",
    "LS": "file_list",
    "Bash": "shell_run",
    "Write": "file_write",
    "Edit": "file_edit",
    "MultiEdit": "file_edit",
}
"""Tool names of Claude Code → ours. Names that are in neither are kept as written."""

_KEYS = ("name", "description", "role", "tools", "model", "color")
_ROLES = ("planner", "worker", "reviewer", "synthesizer")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TOOL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,127}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}")


class AgentDefinition(Frozen):
    """One kind of agent.

    `tools` None means every tool that the run permits. `model` None takes the run's model. `source` is the
    file it came from.
    """

    name: str
    description: str
    role: Role | None = None
    tools: tuple[str, ...] | None = None
    model: str | None = None
    color: str | None = None
    prompt: str
    source: str


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with a definition file, as one line for people: `path:line: message; hint`."""

    path: str
    line: int
    message: str
    hint: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}; {self.hint}"


class InvalidDefinition(Exception):
    """A definition file with its first problem; leaves this module as InvalidInput."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def load_definition(path: Path) -> AgentDefinition:
    """The definition in a file.

    Raises:
        InvalidInput: the file cannot be read or is wrong; the message starts with `path:line:`.
    """
    try:
        return _load(path)
    except InvalidDefinition as error:
        raise _as_input_error(error.problem) from None


def parse_definition(text: str, source: str) -> AgentDefinition:
    """The definition in a text.

    Args:
        source: Name of its file, for messages.

    Raises:
        InvalidInput: it is wrong; the message starts with `source:line:`.
    """
    try:
        return _parse(text, source)
    except InvalidDefinition as error:
        raise _as_input_error(error.problem) from None


def definition_directories(settings: Settings, working_dir: Path, home: Path | None = None) -> list[Path]:
    """Where a user's and a project's definitions are looked for, weakest first."""
    places = [(home or Path.home()) / ".claude" / "agents", working_dir / ".claude" / "agents"]
    if settings.agents_dir is not None:
        places.append(settings.agents_dir)
    return places


class DefinitionCatalog:
    """All definitions by name: the built-in ones, overridden by each directory in turn.

    A file that is wrong is left out and reported; it does not keep the others from being used. Asking for
    it by name raises its problem.

    Args:
        directories: Weakest first (user, then project); one that does not exist holds nothing.

    Attributes:
        problems: What is wrong or doubtful, duplicates included, in the order it was found.
    """

    def __init__(self, directories: Sequence[Path] = ()) -> None:
        self.problems: list[Problem] = []
        self._definitions: dict[str, AgentDefinition] = {}
        self._broken: dict[str, Problem] = {}
        for directory in (BUILT_IN_DIR, *directories):
            self._add(directory)

    def list(self) -> list[AgentDefinition]:
        """By name."""
        return [self._definitions[name] for name in sorted(self._definitions)]

    def get(self, name: str) -> AgentDefinition:
        """The definition of this name.

        Raises:
            InvalidInput: its file is wrong.
            NotFound: there is none; the hint names the closest.
        """
        if name in self._broken:
            raise _as_input_error(self._broken[name])
        if name in self._definitions:
            return self._definitions[name]
        close = difflib.get_close_matches(name, self._definitions, n=1)
        raise NotFound(
            f"there is no agent definition {name!r}",
            hint=f"did you mean {close[0]!r}?"
            if close
            else f"there are {', '.join(sorted(self._definitions))}",
        )

    def _add(self, directory: Path) -> None:
        here: dict[str, AgentDefinition] = {}
        for path in _files(directory):
            try:
                definition = _load(path)
            except InvalidDefinition as error:
                self.problems.append(error.problem)
                self._broken[path.stem] = error.problem
                continue
            first = here.get(definition.name)
            if first is not None:
                self.problems.append(
                    Problem(
                        str(path),
                        1,
                        f"name {definition.name!r} is already taken by {first.source!r}",
                        "rename one of them",
                    )
                )
                continue
            here[definition.name] = definition
            weaker = self._definitions.get(definition.name)
            if weaker is not None and weaker.source != definition.source:
                self.problems.append(
                    Problem(
                        str(path),
                        1,
                        f"name {definition.name!r} overrides {weaker.source!r}",
                        "rename it if that is not meant",
                        "warning",
                    )
                )
        for name, definition in here.items():
            self._definitions[name] = definition
            self._broken.pop(name, None)


def validate(paths: Iterable[Path], *, known_tools: Collection[str] = TOOL_NAMES) -> list[Problem]:
    """Everything that is wrong (errors) or doubtful (warnings) in these files and folders of `*.md`."""
    found: list[Problem] = []
    seen: dict[str, str] = {}
    for path in paths:
        if not path.exists():
            found.append(Problem(str(path), 1, "does not exist", "name an existing file or folder"))
            continue
        files = _files(path) if path.is_dir() else [path]
        for file in files:
            try:
                definition = _load(file)
            except InvalidDefinition as error:
                found.append(error.problem)
                continue
            found += _doubts(file, definition, known_tools)
            if definition.name in seen:
                message = f"name {definition.name!r} is already taken by {seen[definition.name]!r}"
                found.append(Problem(str(file), 1, message, "rename one of them"))
            seen.setdefault(definition.name, str(file))
    return found


def _doubts(path: Path, definition: AgentDefinition, known: Collection[str]) -> Iterator[Problem]:
    for tool in definition.tools or ():
        if tool not in known:
            close = difflib.get_close_matches(tool, known, n=1)
            yield Problem(
                str(path),
                _line_of_key(path, "tools"),
                f"there is no tool {tool!r} here",
                f"did you mean {close[0]!r}?" if close else "the agent works without it, or remove it",
                "warning",
            )


def _line_of_key(path: Path, key: str) -> int:
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
        if line.startswith(f"{key}:"):
            return number
    return 1


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.rglob("*.md") if path.is_file())[:FILES_MAX]


def _load(path: Path) -> AgentDefinition:
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX_BYTES + 1)
    except OSError as error:
        raise _wrong(
            source, 1, f"cannot be read: {error.strerror}", "check its name and permissions"
        ) from None
    if len(data) > FILE_MAX_BYTES:
        raise _wrong(source, 1, f"is larger than {FILE_MAX_BYTES} bytes", "is this an agent definition?")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _wrong(
            source, line, f"byte {data[error.start]:#04x} is not UTF-8", "save the file as UTF-8"
        ) from None
    return _parse(text, source)


def _parse(text: str, source: str) -> AgentDefinition:
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[0].rstrip() != "---":
        raise _wrong(source, 1, "there is no front matter", "start the file with a line of ---")
    end = next((number for number, line in enumerate(lines) if number and line.rstrip() == "---"), None)
    if end is None:
        raise _wrong(source, 1, "the front matter is not closed", "end it with a line of ---")
    fields = _front_matter("\n".join(lines[1:end]), source)
    prompt = "\n".join(lines[end + 1 :]).strip()
    if not prompt:
        raise _wrong(source, end + 1, "the body is empty", "write the system prompt below the front matter")
    for key in ("name", "description"):
        if key not in fields:
            raise _wrong(source, 1, f"{key!r} is missing", f"add a line '{key}: …' to the front matter")
    tools = fields.get("tools")
    return AgentDefinition(
        name=_matching(source, fields["name"], _NAME, "name", "use letters, digits, - and _, at most 64"),
        description=_description(source, fields["description"]),
        role=_role(source, fields["role"]) if "role" in fields else None,
        tools=_tools(source, tools) if tools else None,
        model=_model(source, fields["model"]) if "model" in fields else None,
        color=_string(source, fields["color"], "color") if "color" in fields else None,
        prompt=prompt,
        source=source,
    )


@dataclass(frozen=True, slots=True)
class _Field:
    """A value of the front matter: a string, a list of strings with their lines, or neither."""

    value: Any
    line: int


def _front_matter(block: str, source: str) -> dict[str, _Field]:
    """The keys of the block, with the lines they stand in."""
    try:
        # The node tree rather than plain values: it knows lines, sees duplicate keys, and keeps `no` and
        # `2024-01-01` the words they are.
        root = yaml.compose(block, Loader=yaml.SafeLoader)  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        raise _malformed(source, block, error) from None
    except yaml.reader.ReaderError as error:
        line = block.count("\n", 0, error.position) + 2
        code = ord(block[error.position])
        raise _wrong(source, line, f"character U+{code:04X} is not allowed", "remove it") from None
    except RecursionError:
        raise _wrong(source, 2, "the front matter is nested too deeply", "keep it flat") from None
    if not isinstance(root, yaml.MappingNode):
        raise _wrong(source, 2, "the front matter is no list of 'key: value' lines", "write 'name: …'")
    fields: dict[str, _Field] = {}
    for key_node, value_node in root.value:
        line = int(key_node.start_mark.line) + 2
        key = str(key_node.value)
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_KEYS)}"
            raise _wrong(source, line, f"key {key[:100]!r} is unknown", hint)
        if key in fields:
            raise _wrong(source, line, f"key {key!r} stands there twice", "remove one")
        fields[key] = _Field(_value(value_node), line)
    return fields


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return "" if node.tag == "tag:yaml.org,2002:null" else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        items: list[yaml.Node] = node.value
        # One level only: an alias may make a list contain itself.
        return tuple(
            _Field(_value(item) if isinstance(item, yaml.ScalarNode) else None, int(item.start_mark.line) + 2)
            for item in items
        )
    return None


def _malformed(source: str, block: str, error: yaml.MarkedYAMLError) -> InvalidDefinition:
    mark = error.problem_mark or error.context_mark
    number = min(int(mark.line), block.count("\n")) if mark else 0
    line = block.split("\n")[number]
    problem = error.problem or "malformed YAML"
    if "\t" in line[: len(line) - len(line.lstrip())] or "'\\t'" in problem:
        return _wrong(source, number + 2, "a tab indents the line", "use spaces")
    if "mapping values are not allowed" in problem:
        return _wrong(
            source, number + 2, "a ': ' inside a value", "put the whole value in quotes, or use 'key: >-'"
        )
    return _wrong(source, number + 2, f"not valid YAML: {problem}", "correct that line, or put it in quotes")


def _string(source: str, field: _Field, key: str) -> str:
    if not isinstance(field.value, str) or not field.value.strip():
        raise _wrong(source, field.line, f"{key!r} is no text", f"write '{key}: …' in one line")
    return field.value.strip()


def _matching(source: str, field: _Field, pattern: re.Pattern[str], key: str, hint: str) -> str:
    text = _string(source, field, key)
    if not pattern.fullmatch(text):
        raise _wrong(source, field.line, f"{key} {text[:100]!r} is not allowed", hint)
    return text


def _description(source: str, field: _Field) -> str:
    text = _string(source, field, "description")
    if len(text) > DESCRIPTION_CHARS_MAX:
        raise _wrong(
            source,
            field.line,
            f"the description has {len(text)} characters, the limit is {DESCRIPTION_CHARS_MAX}",
            "say when to use the agent; the rest belongs in the body",
        )
    return text


def _model(source: str, field: _Field) -> str | None:
    text = _matching(source, field, _MODEL, "model", "write a model's name, or inherit")
    return None if text == "inherit" else text


def _role(source: str, field: _Field) -> Role:
    text = _string(source, field, "role")
    for role in _ROLES:
        if text == role:
            return role
    raise _wrong(source, field.line, f"role {text[:100]!r} is unknown", f"known are {', '.join(_ROLES)}")


def _tools(source: str, field: _Field) -> tuple[str, ...] | None:
    """The names, ours where there is one, each once. `*` and an empty value are all tools."""
    value: str | tuple[_Field, ...] | None = field.value
    if value is None:
        raise _wrong(source, field.line, "'tools' is no list of names", "write 'tools: Read, Grep'")
    listed = not isinstance(value, str)
    names = value if listed else tuple(_Field(part, field.line) for part in value.split(",") if part.strip())
    found: dict[str, None] = {}
    for name in names:
        text = _string(source, name, "tools")
        if text == "*":
            return None
        if not _TOOL.fullmatch(text):
            raise _wrong(
                source, name.line, f"{text[:100]!r} is no tool's name", "write bare names, as in 'Read, Grep'"
            )
        found[CLAUDE_TOOLS.get(text, text)] = None
    return tuple(found) if found or listed else None


def _wrong(source: str, line: int, message: str, hint: str) -> InvalidDefinition:
    return InvalidDefinition(Problem(source, line, message, hint))


def _as_input_error(problem: Problem) -> InvalidInput:
    return InvalidInput(f"{problem.path}:{problem.line}: {problem.message}", hint=problem.hint)
