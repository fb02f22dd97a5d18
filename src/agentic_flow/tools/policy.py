"""Which tool calls are allowed, refused, or need somebody's yes. Pure decisions over rules from a TOML file.

    [defaults]                      # what no rule covers; these are the built-in values
    read = "allow"
    write = "ask"
    destructive = "ask"

    [[rules]]                       # the first rule that matches decides
    effect = "deny"                 # allow, ask or deny
    tools = ["shell_run"]           # names or globs; absent: every tool
    arguments.argv = { regex = "\\bsudo\\b" }
    reason = "no root"

    [[rules]]
    effect = "allow"
    tools = ["file_write", "file_edit"]
    kinds = ["destructive"]         # read, write, destructive; absent: all
    arguments.path = { glob = "docs/*" }
    tenant = "default"              # glob; absent: every tenant
    subject = "local-*"             # glob; absent: everybody
    scope = "tools:write"           # the principal must hold it

An argument's text is the string itself; for a list of strings the shell-quoted words (`git push --force`);
for anything else its JSON. A pattern on an argument that the call does not have does not match. In a glob
`*` also crosses `/`; a regex is searched, not anchored.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import orjson
from pydantic import Field, ValidationError, field_validator, model_validator

from agentic_flow.core.auth import Principal
from agentic_flow.core.errors import InvalidSettings
from agentic_flow.core.messages import Frozen, JsonObject
from agentic_flow.core.toolkit import ToolKind

Effect = Literal["allow", "ask", "deny"]

RULES_MAX = 1000
_POLICY_FILE_MAX_BYTES = 1024 * 1024
_RULE_HEAD = re.compile(r"^\s*\[\[\s*rules\s*\]\]", re.MULTILINE)

GlobText = Annotated[str, Field(min_length=1, max_length=1000)]


class ArgumentPattern(Frozen):
    """A glob over the whole text of an argument, or a regular expression searched in it."""

    glob: GlobText | None = None
    regex: Annotated[str, Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _one(self) -> ArgumentPattern:
        if (self.glob is None) == (self.regex is None):
            raise ValueError("give exactly one of glob and regex")
        return self

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str | None) -> str | None:
        if regex is not None:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"no regular expression: {error}") from None
        return regex

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.regex if self.regex is not None else fnmatch.translate(self.glob or ""))

    def matches(self, text: str) -> bool:
        return self._pattern.search(text) is not None


class Rule(Frozen):
    """One entry of the policy; every condition that is present must hold."""

    effect: Effect
    tools: tuple[GlobText, ...] = ("*",)
    kinds: tuple[ToolKind, ...] = ("read", "write", "destructive")
    arguments: dict[str, ArgumentPattern] = Field(default_factory=dict[str, ArgumentPattern])
    tenant: GlobText = "*"
    subject: GlobText = "*"
    scope: GlobText | None = None
    reason: str | None = None

    @field_validator("tools", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def concerns(self, principal: Principal, tool: str, kind: ToolKind) -> bool:
        """Whether it can apply to this caller and tool at all, for some arguments."""
        return (
            kind in self.kinds
            and any(fnmatch.fnmatchcase(tool, glob) for glob in self.tools)
            and fnmatch.fnmatchcase(principal.tenant, self.tenant)
            and fnmatch.fnmatchcase(principal.subject, self.subject)
            and (self.scope is None or principal.allows(self.scope))
        )

    def fits(self, arguments: Mapping[str, Any]) -> bool:
        """Whether every argument pattern matches."""
        return all(
            name in arguments
            and arguments[name] is not None
            and pattern.matches(argument_text(arguments[name]))
            for name, pattern in self.arguments.items()
        )


class Defaults(Frozen):
    """What happens to calls that no rule covers, by the tool's kind."""

    read: Effect = "allow"
    write: Effect = "ask"
    destructive: Effect = "ask"


@dataclass(frozen=True, slots=True)
class Decision:
    """The effect, and why: the number of the rule that decided (from 1), or None for a default."""

    effect: Effect
    rule: int | None
    reason: str

    @property
    def label(self) -> str:
        """As the audit log records it: `deny:rule 3`, `ask:default`."""
        return f"{self.effect}:{f'rule {self.rule}' if self.rule else 'default'}"


class Policy(Frozen):
    """Rules in order, and defaults."""

    rules: Annotated[tuple[Rule, ...], Field(max_length=RULES_MAX)] = ()
    defaults: Defaults = Defaults()

    def decide(
        self, principal: Principal, tool: str, kind: ToolKind, arguments: Mapping[str, Any]
    ) -> Decision:
        """What is to happen with this call. Pure: the same question has the same answer.

        Args:
            arguments: Validated arguments with their defaults filled in.
        """
        for number, rule in enumerate(self.rules, start=1):
            if rule.concerns(principal, tool, kind) and rule.fits(arguments):
                return Decision(rule.effect, number, rule.reason or f"rule {number} of the policy")
        effect: Effect = getattr(self.defaults, kind)
        return Decision(effect, None, f"the default for {kind} tools")

    def may_permit(self, principal: Principal, tool: str, kind: ToolKind, *, approver: bool) -> bool:
        """Whether some arguments could pass: False means that every call of this tool is refused.

        Args:
            approver: Whether there is somebody to say yes where the policy asks.
        """
        passing = {"allow", "ask"} if approver else {"allow"}
        for rule in self.rules:
            if not rule.concerns(principal, tool, kind):
                continue
            if rule.effect in passing:
                return True
            if not rule.arguments:
                return False
        return getattr(self.defaults, kind) in passing


def argument_text(value: Any) -> str:
    """The text of an argument that patterns are held against."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in cast(list[Any], value)):
        return shlex.join(cast(list[str], value))
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def load_policy(path: Path | None) -> Policy:
    """The policy of `tools.policy_file`; the defaults when none is set.

    Raises:
        InvalidSettings: the file cannot be read or an entry is wrong; names file, line and entry.
    """
    if path is None:
        return Policy()
    try:
        with path.open("rb") as file:
            data = file.read(_POLICY_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise InvalidSettings(
            f"policy file {str(path)!r} cannot be read: {error.strerror}",
            hint="correct tools.policy_file or the file's permissions",
        ) from None
    if len(data) > _POLICY_FILE_MAX_BYTES:
        raise InvalidSettings(f"policy file {str(path)!r} is larger than {_POLICY_FILE_MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidSettings(
            f"{path}:{line}: byte {data[error.start]:#04x} is not UTF-8", hint="save the file as UTF-8"
        ) from None
    return parse_policy(text, str(path))


def parse_policy(text: str, source: str) -> Policy:
    """A policy from TOML.

    Args:
        source: Name of the file, for messages.

    Raises:
        InvalidSettings: names source, line and entry at fault.
    """
    try:
        raw: JsonObject = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        line = int(found[1]) if found else text.count("\n") + 1
        raise InvalidSettings(f"{source}:{line}: not valid TOML: {error}", hint="correct that line") from None
    try:
        return Policy.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = first["loc"]
        shown = "" if first["type"] in ("missing", "extra_forbidden") else f" = {first['input']!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidSettings(
            f"{source}:{_line_of(text, location)}: {_entry_name(location)}{shown}: {message}",
            hint="a rule has effect, tools, kinds, arguments, tenant, subject, scope and reason",
        ) from None


def _entry_name(location: tuple[int | str, ...]) -> str:
    """`rules[2].effect`, rules counted from 1 as people do."""
    name = ""
    for previous, part in zip((None, *location), location, strict=False):
        if isinstance(part, int):
            name += f"[{part + 1 if previous == 'rules' else part}]"
        else:
            name += f".{part}" if name else part
    return name or "the file"


def _line_of(text: str, location: tuple[int | str, ...]) -> int:
    """The line of an entry: of its key if it can be found in its table, else of the table's head."""
    start, end = 0, len(text)
    if len(location) > 1 and location[0] == "rules" and isinstance(location[1], int):
        heads = [match.start() for match in _RULE_HEAD.finditer(text)]
        if location[1] < len(heads):
            start = heads[location[1]]
            end = heads[location[1] + 1] if location[1] + 1 < len(heads) else len(text)
    for part in reversed(location):
        if isinstance(part, str):
            key = re.compile(rf"^[ \t]*(?:[\w.\"-]+\.)?\"?{re.escape(part)}\"?\s*[.=]", re.MULTILINE)
            if found := key.search(text, start, end):
                return text.count("\n", 0, found.start()) + 1
    line_start = start + len(text[start:]) - len(text[start:].lstrip())
    return text.count("\n", 0, line_start) + 1
