"""Templates and conditions of workflow files: Jinja's grammar, over JSON values only.

Jinja parses; the evaluation is ours. A template sees tables, lists, texts and numbers, never a Python object,
so there is no attribute to climb and nothing to call; what is not listed here is refused when the file is
checked. Every template is bounded in operations and in what it prints, and ends.

    {{ inputs.folder }}   {{ steps.find.output.paths | length }}   {{ steps.a.output.text | default("none") }}
    {% if … %}…{% elif … %}…{% else %}…{% endif %}   {% for x in … %}{{ loop.index }}: {{ x }}{% endfor %}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, cast

import orjson

from agentic_flow.core.errors import InvalidInput

if TYPE_CHECKING:
    from jinja2 import nodes

SOURCE_CHARS_MAX = 100_000
NESTING_MAX = 50
OPERATIONS_MAX = 200_000
RENDERED_CHARS_MAX = 1_000_000

FILTERS = (
    "count default first fromjson join json last length lines lower map max min sort sum tojson trim unique "
    "upper"
).split()
"""`lines`: a text's lines that are not blank; `fromjson`: the value of a JSON text; `map(attribute="a")`."""
_TESTS = ("defined", "undefined", "none", "string", "number")
_MAKES_NO_LIST = frozenset("count join json length lower max min sum tojson trim upper".split())


class _Absent(Exception):
    """A name that has no value; `default` and `is defined` catch it."""

    def __init__(self, path: str, missing: str, known: Sequence[str]) -> None:
        super().__init__(path)
        self.path, self.missing, self.known = path, missing, known

    def error(self) -> InvalidInput:
        known = ", ".join(sorted(self.known)[:20]) or "nothing"
        return InvalidInput(
            f"{self.path!r} has no value: there is no {self.missing!r}",
            hint=f"known here: {known}; or give one with `| default(…)`",
        )


@dataclass(frozen=True, slots=True)
class Reference:
    """A name that a template uses, as far as it is fixed: `steps.a.output.paths` → ("steps", "a", …).

    `guarded`: it may be without a value, because of `default` or `is defined`.
    """

    path: tuple[str, ...]
    guarded: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed template. `native`: it is one expression, whose value may be of any kind."""

    source: str
    body: tuple[nodes.Node, ...]
    native: bool
    references: tuple[Reference, ...]

    @property
    def makes_no_list(self) -> bool:
        """Whether its value can be seen to be no list, whatever the names stand for."""
        from jinja2 import nodes

        if not self.native:
            return True
        node = _only(self.body)
        if isinstance(node, nodes.Filter):
            return node.name in _MAKES_NO_LIST
        return isinstance(node, nodes.Const | nodes.Concat | nodes.Compare | nodes.Not | nodes.Dict)

    @property
    def plain(self) -> tuple[str, ...] | None:
        """The name, if the template is nothing but one: `{{ inputs.files }}` → ("inputs", "files")."""
        return _path(_only(self.body)) if self.native else None

    def value(self, scope: Mapping[str, Any]) -> Any:
        """What it comes to: the expression's value if it is one expression, else text.

        Raises:
            InvalidInput: a name has no value, a type does not fit, or it is too much.
        """
        evaluation = _Evaluation(scope)
        try:
            if self.native:
                return evaluation.value(_only(self.body))
            return evaluation.text(self.body)
        except _Absent as absent:
            raise absent.error() from None
        except RecursionError:
            raise InvalidInput(f"{_head(self.source)!r} is nested too deep", hint="simplify it") from None
        except TypeError as error:
            raise InvalidInput(f"{_head(self.source)!r}: {error}", hint="compare like with like") from error


def is_template(text: str) -> bool:
    """Whether there is anything to fill in."""
    return "{{" in text or "{%" in text


@lru_cache(4096)
def template(source: str) -> Template:
    """A text with places to fill in.

    Raises:
        InvalidInput: it cannot be read, or uses what is not offered.
    """
    return _parsed(source, source)


@lru_cache(4096)
def expression(source: str) -> Template:
    """A bare expression, as in `when` and `over`; braces around all of it are allowed.

    Raises:
        InvalidInput: it cannot be read, or is more than one expression.
    """
    bare = source.strip()
    if bare.startswith("{{") and bare.endswith("}}") and bare.count("{{") == 1:
        bare = bare[2:-2].strip()
    if not bare or is_template(bare) or "}}" in bare or "%}" in bare:
        raise InvalidInput(f"{_head(source)!r} is no expression", hint="write one, such as inputs.files")
    return _parsed("{{ " + bare + " }}", source)


def _parsed(text: str, source: str) -> Template:
    from jinja2 import Environment, TemplateSyntaxError, nodes

    if len(text) > SOURCE_CHARS_MAX:
        raise InvalidInput(f"a template has {len(text)} characters", hint=f"the limit is {SOURCE_CHARS_MAX}")
    if _depth(text) > NESTING_MAX:
        raise InvalidInput(f"{_head(source)!r} is nested too deep", hint=f"the limit is {NESTING_MAX}")
    try:
        parsed = Environment(keep_trailing_newline=True).parse(text)  # noqa: S701 - prompts are no HTML
        body = tuple(parsed.body)
        for node in body:
            _check(node)
        references = tuple(_references(body, frozenset(), guarded=False))
    except TemplateSyntaxError as error:
        raise InvalidInput(
            f"{_head(source)!r} cannot be read: {error.message} (line {error.lineno})", hint="correct it"
        ) from error
    except (RecursionError, ValueError) as error:
        raise InvalidInput(f"{_head(source)!r} cannot be read", hint="simplify it") from error
    native = (
        len(body) == 1
        and isinstance(body[0], nodes.Output)
        and len(body[0].nodes) == 1
        and not isinstance(body[0].nodes[0], nodes.TemplateData)
    )
    return Template(source, body, native, references)


def _depth(text: str) -> int:
    depth = most = 0
    for character in text:
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return most


def _only(body: Sequence[nodes.Node]) -> nodes.Node:
    return cast("nodes.Output", body[0]).nodes[0]


def _head(source: str) -> str:
    line = " ".join(source.split())
    return line if len(line) <= 80 else f"{line[:77]}..."


# ---- what is offered -------------------------------------------------------------------------------------


def _check(node: nodes.Node) -> None:
    """Refuse what is not offered, wherever it stands."""
    from jinja2 import nodes

    offered = (
        *(nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Name, nodes.Const, nodes.Getattr),
        *(nodes.Getitem, nodes.Slice, nodes.List, nodes.Dict, nodes.Pair, nodes.Compare, nodes.Operand),
        *(nodes.And, nodes.Or, nodes.Not, nodes.CondExpr, nodes.Concat, nodes.Add, nodes.Sub, nodes.Neg),
        *(nodes.Filter, nodes.Test, nodes.Keyword),
    )
    if not isinstance(node, offered):
        _refuse(node, f"{type(node).__name__.lower()} is not offered")
    if isinstance(node, nodes.Filter):
        if node.name not in FILTERS:
            _refuse(node, f"there is no filter {node.name!r}", f"there are {', '.join(FILTERS)}")
        if node.node is None or node.dyn_args is not None or node.dyn_kwargs is not None:
            _refuse(node, f"the filter {node.name!r} takes plain arguments only")
        _check_arguments(node)
    if isinstance(node, nodes.Test) and (node.name not in _TESTS or node.args or node.kwargs):
        _refuse(node, f"there is no test {node.name!r}", f"there are {', '.join(_TESTS)}")
    if isinstance(node, nodes.For) and (
        node.test is not None or node.recursive or not isinstance(node.target, nodes.Name)
    ):
        _refuse(node, "a loop takes one name and a list, without a condition")
    for inner in node.iter_child_nodes():
        _check(inner)


def _check_arguments(node: nodes.Filter) -> None:
    names = [pair.key for pair in node.kwargs]
    if node.name == "map":
        if names != ["attribute"] or node.args:
            _refuse(node, "the filter 'map' takes an attribute", 'write map(attribute="path")')
    elif names or len(node.args) > {"default": 1, "join": 1}.get(node.name, 0):
        _refuse(node, f"the filter {node.name!r} takes other arguments", "see the guide to workflows")
    elif node.name == "default" and not node.args:
        _refuse(node, "the filter 'default' needs a value", 'write default("")')


def _refuse(node: nodes.Node, what: str, hint: str = "see the guide to workflows") -> NoReturn:
    raise InvalidInput(f"line {node.lineno} of the template: {what}", hint=hint)


# ---- which names are used --------------------------------------------------------------------------------


def _path(node: nodes.Node | None) -> tuple[str, ...] | None:
    """`steps.a["output"]` → ("steps", "a", "output"); None when it is not built of fixed names."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        return (node.name,)
    if isinstance(node, nodes.Getattr):
        before, name = _path(node.node), node.attr
    elif (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and isinstance(node.arg.value, str)
    ):
        before, name = _path(node.node), node.arg.value
    else:
        return None
    return None if before is None else (*before, name)


def _references(found: Sequence[nodes.Node], bound: frozenset[str], *, guarded: bool) -> Iterator[Reference]:
    from jinja2 import nodes

    for node in found:
        path = _path(node)
        if path is not None:
            if path[0] not in bound:
                yield Reference(path, guarded)
        elif isinstance(node, nodes.For):
            target = cast("nodes.Name", node.target).name
            yield from _references([node.iter], bound, guarded=guarded)
            yield from _references(node.body, bound | {target, "loop"}, guarded=guarded)
            yield from _references(node.else_, bound, guarded=guarded)
        elif isinstance(node, nodes.Filter) and node.name == "default":
            yield from _references([cast("nodes.Node", node.node)], bound, guarded=True)
            yield from _references(node.args, bound, guarded=guarded)
        elif isinstance(node, nodes.Test) and node.name in ("defined", "undefined"):
            yield from _references([node.node], bound, guarded=True)
        else:
            yield from _references(list(node.iter_child_nodes()), bound, guarded=guarded)


# ---- evaluation ------------------------------------------------------------------------------------------


@dataclass
class _Evaluation:
    """One evaluation, which counts what it does."""

    scope: Mapping[str, Any]
    _operations: int = 0
    _local: dict[str, Any] = field(default_factory=dict[str, Any])

    def text(self, body: Sequence[nodes.Node]) -> str:
        """What a template prints."""
        parts: list[str] = []
        self._print(body, parts, [0])
        return "".join(parts)

    def _print(self, body: Sequence[nodes.Node], parts: list[str], printed: list[int]) -> None:
        from jinja2 import nodes

        for node in body:
            self._count()
            if isinstance(node, nodes.Output):
                for inner in node.nodes:
                    piece = (
                        inner.data if isinstance(inner, nodes.TemplateData) else as_text(self.value(inner))
                    )
                    printed[0] += len(piece)
                    _check_size(printed[0])
                    parts.append(piece)
            elif isinstance(node, nodes.If):
                self._print(self._branch(node), parts, printed)
            else:
                self._loop(cast("nodes.For", node), parts, printed)

    def _branch(self, node: nodes.If) -> Sequence[nodes.Node]:
        for one in (node, *node.elif_):
            if self.value(one.test):
                return one.body
        return node.else_

    def _loop(self, node: nodes.For, parts: list[str], printed: list[int]) -> None:
        entries = self.value(node.iter)
        if not isinstance(entries, list):
            raise TypeError(f"a loop over {_kind(entries)}, which is no list")
        many = cast(list[Any], entries)
        if not many:
            self._print(node.else_, parts, printed)
        outer = dict(self._local)
        for index, entry in enumerate(many, start=1):
            self._local |= {
                cast("nodes.Name", node.target).name: entry,
                "loop": {"index": index, "first": index == 1, "last": index == len(many)},
            }
            self._print(node.body, parts, printed)
        self._local = outer

    def _count(self) -> None:
        self._operations += 1
        if self._operations > OPERATIONS_MAX:
            raise InvalidInput(
                f"a template does more than {OPERATIONS_MAX} operations", hint="let a step do the work"
            )

    def value(self, node: nodes.Node) -> Any:
        """The value of an expression."""
        from jinja2 import nodes

        self._count()
        match node:
            case nodes.Const():
                return node.value
            case nodes.Name():
                if node.name in self._local:
                    return self._local[node.name]
                return _item(self.scope, node.name, node.name)
            case nodes.Getattr():
                return _item(self.value(node.node), node.attr, _shown(node))
            case nodes.Getitem():
                return self._part(node)
            case nodes.List():
                return [self.value(item) for item in node.items]
            case nodes.Dict():
                return {as_text(self.value(pair.key)): self.value(pair.value) for pair in node.items}
            case nodes.And():
                return self.value(node.left) and self.value(node.right)
            case nodes.Or():
                return self.value(node.left) or self.value(node.right)
            case nodes.Not():
                return not self.value(node.node)
            case nodes.CondExpr():
                if self.value(node.test):
                    return self.value(node.expr1)
                return self.value(node.expr2) if node.expr2 is not None else ""
            case nodes.Compare():
                return self._compared(node)
            case nodes.Concat():
                return _sized("".join(as_text(self.value(part)) for part in node.nodes))
            case nodes.Add():
                return _number(self.value(node.left)) + _number(self.value(node.right))
            case nodes.Sub():
                return _number(self.value(node.left)) - _number(self.value(node.right))
            case nodes.Neg():
                return -_number(self.value(node.node))
            case nodes.Test():
                return self._tested(node)
            case nodes.Filter():
                return self._filtered(node)
            case _:
                raise AssertionError(f"{type(node).__name__} was let through the check")

    def _part(self, node: nodes.Getitem) -> Any:
        from jinja2 import nodes

        whole = self.value(node.node)
        if isinstance(node.arg, nodes.Slice):
            if not isinstance(whole, list | str) or node.arg.step is not None:
                raise TypeError(f"a part of {_kind(whole)}, which is neither list nor text")
            start, stop = (
                _index(self.value(end)) if end is not None else None
                for end in (node.arg.start, node.arg.stop)
            )
            return cast("list[Any] | str", whole)[start:stop]
        return _item(whole, self.value(node.arg), _shown(node))

    def _compared(self, node: nodes.Compare) -> bool:
        left = self.value(node.expr)
        for operand in node.ops:
            right = self.value(operand.expr)
            if not _COMPARE[operand.op](left, right):
                return False
            left = right
        return True

    def _tested(self, node: nodes.Test) -> bool:
        if node.name in ("defined", "undefined"):
            try:
                self.value(node.node)
            except _Absent:
                return node.name == "undefined"
            return node.name == "defined"
        value = self.value(node.node)
        if node.name == "none":
            return value is None
        if node.name == "string":
            return isinstance(value, str)
        return isinstance(value, int | float) and not isinstance(value, bool)

    def _filtered(self, node: nodes.Filter) -> Any:
        assert node.node is not None
        if node.name == "default":
            try:
                return self.value(node.node)
            except _Absent:
                return self.value(node.args[0])
        value = self.value(node.node)
        if node.name == "map":
            names = as_text(self.value(node.kwargs[0].value)).split(".")
            return [self._descend(entry, names) for entry in _list(value, "map")]
        if node.name == "join":
            between = as_text(self.value(node.args[0])) if node.args else ""
            return _sized(between.join(as_text(entry) for entry in self._each(value, "join")))
        if isinstance(value, list):
            self._operations += len(cast(list[Any], value))
            self._count()
        return _FILTER[node.name](value)

    def _each(self, value: Any, name: str) -> Iterator[Any]:
        for entry in _list(value, name):
            self._count()
            yield entry

    def _descend(self, entry: Any, names: Sequence[str]) -> Any:
        for name in names:
            self._count()
            entry = _item(entry, name, ".".join(names))
        return entry


def _item(whole: Any, key: Any, path: str) -> Any:
    """What a table or list has there. Nothing else has parts."""
    if isinstance(whole, Mapping):
        table = cast(Mapping[str, Any], whole)
        if isinstance(key, str) and key in table:
            return table[key]
        raise _Absent(path, str(key), list(table))
    if isinstance(whole, list):
        entries = cast(list[Any], whole)
        index = _index(key)
        if -len(entries) <= index < len(entries):
            return entries[index]
        raise _Absent(path, str(key), [f"{len(entries)} entries"])
    raise _Absent(path, str(key), [f"{_kind(whole)} without parts"])


def _shown(node: nodes.Node) -> str:
    path = _path(node)
    return ".".join(path) if path else "an expression"


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no place in a list")
    return value


def _number(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{_kind(value)} is no number; texts are joined with ~")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"the filter {name!r} takes a list, not {_kind(value)}")
    return cast(list[Any], value)


def _kind(value: Any) -> str:
    for kind, name in ((bool, "a truth value"), (str, "a text"), (list, "a list"), (dict, "a table")):
        if isinstance(value, kind):
            return name
    return "nothing" if value is None else "a number"


def as_text(value: Any) -> str:
    """How a value is printed: a text as it is, the rest as JSON."""
    return value if isinstance(value, str) else _sized(orjson.dumps(value).decode())


def _sized(text: str) -> str:
    _check_size(len(text))
    return text


def _check_size(chars: int) -> None:
    if chars > RENDERED_CHARS_MAX:
        raise InvalidInput(
            f"a template makes more than {RENDERED_CHARS_MAX} characters", hint="take a part of the output"
        )


def _within(left: Any, right: Any) -> bool:
    if isinstance(right, str):
        if not isinstance(left, str):
            raise TypeError(f"{_kind(left)} is not in a text")
        return left in right
    if isinstance(right, list | dict):
        return left in right
    raise TypeError(f"nothing is in {_kind(right)}")


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lteq": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gteq": lambda a, b: a >= b,
    "in": _within,
    "notin": lambda a, b: not _within(a, b),
}


def _length(value: Any) -> int:
    if isinstance(value, str | list | dict):
        return len(cast("str | list[Any] | dict[str, Any]", value))
    raise TypeError(f"{_kind(value)} has no length")


def _end(at: int, name: str) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        entries = _list(value, name)
        if not entries:
            raise _Absent(f"an empty list | {name}", name, [])
        return entries[at]

    return take


def _of_text(function: Callable[[str], Any], name: str) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        if not isinstance(value, str):
            raise TypeError(f"the filter {name!r} takes a text, not {_kind(value)}")
        return function(value)

    return apply


def _from_json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            f"{_head(text)!r} is no JSON: {error}", hint="have the step answer with JSON and nothing else"
        ) from error


def _extreme(function: Callable[[list[Any]], Any], name: str) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        entries = _list(value, name)
        if not entries and name != "sum":
            raise _Absent(f"an empty list | {name}", name, [])
        return function([_number(entry) for entry in entries])

    return apply


_FILTER: dict[str, Callable[[Any], Any]] = {
    "count": _length,
    "length": _length,
    "first": _end(0, "first"),
    "last": _end(-1, "last"),
    "fromjson": _of_text(_from_json, "fromjson"),
    "json": lambda value: _sized(orjson.dumps(value).decode()),
    "tojson": lambda value: _sized(orjson.dumps(value).decode()),
    "lines": _of_text(lambda text: [line for line in text.splitlines() if line.strip()], "lines"),
    "lower": _of_text(str.lower, "lower"),
    "upper": _of_text(str.upper, "upper"),
    "trim": _of_text(str.strip, "trim"),
    "max": _extreme(max, "max"),
    "min": _extreme(min, "min"),
    "sum": _extreme(sum, "sum"),
    "sort": lambda value: sorted(_list(value, "sort")),
    "unique": lambda value: list({orjson.dumps(entry): entry for entry in _list(value, "unique")}.values()),
}
