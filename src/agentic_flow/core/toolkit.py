"""What a tool is: name, input, handler, and the path rules that every tool obeys.

Here and not in `tools`, because each service brings tools of its own and imports only the core.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import GenerateJsonSchema

from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import Cancelled, InvalidInput
from agentic_flow.core.messages import JsonObject, ToolSpec
from agentic_flow.core.ports import ToolScope

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

T = TypeVar("T")

ToolKind = Literal["read", "write", "destructive"]
"""`read` changes nothing, `write` adds, `destructive` may replace, remove or run what the caller wrote."""

NAME_CHARS_MAX = 40
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")


class ToolInput(BaseModel):
    """Arguments of a tool: strict, frozen, unknown keys refused. Field descriptions are for the model."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


I = TypeVar("I", bound=ToolInput)  # noqa: E741 - the input


@dataclass(frozen=True, slots=True)
class ToolCall(Generic[I]):
    """One validated call, as a handler gets it.

    `deadline` is the earlier of the caller's and the tool's own; `result_max_bytes` is the size of the
    encoded result past which the ToolBox cuts. `idempotency_key` is the same on every attempt.
    """

    principal: Principal
    scope: ToolScope
    arguments: I
    deadline: Deadline
    result_max_bytes: int
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Tool(Generic[I]):
    """A tool and what may be expected of it.

    Args:
        name: `noun_verb` or `noun_object_verb`; at most 40 characters, because hosts prefix it.
        description: For the model: what it does, what comes back, one to three sentences.
        input: Model of the arguments.
        handler: Does the work; its result is a JSON object. An AgenticFlowError becomes a readable result.
        kind: What it may change.
        idempotent: A second call with equal arguments changes nothing more.
        open_world: It leaves the machine or runs what the caller wrote.
        private_arguments: Arguments whose text the audit log replaces by its hash.
    """

    name: str
    description: str
    input: type[I]
    handler: Callable[[ToolCall[I]], Awaitable[JsonObject]]
    kind: ToolKind = "read"
    idempotent: bool = True
    open_world: bool = False
    private_arguments: frozenset[str] = field(default_factory=frozenset[str])

    def __post_init__(self) -> None:
        assert _NAME.fullmatch(self.name), self.name
        assert len(self.name) <= NAME_CHARS_MAX, self.name
        assert self.private_arguments <= set(self.input.model_fields), self.name

    @property
    def input_schema(self) -> JsonObject:
        """JSON Schema 2020-12 of the arguments, without the titles that only cost tokens."""
        return self.input.model_json_schema(schema_generator=_PlainSchema)

    @property
    def spec(self) -> ToolSpec:
        """The tool as a model sees it."""
        return ToolSpec(
            name=self.name,
            description=self.description,
            input_schema=self.input_schema,
            read_only=self.kind == "read",
        )


class _PlainSchema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def generate(self, schema: Any, mode: Any = "validation") -> JsonObject:
        generated = super().generate(schema, mode)
        generated.pop("title", None)
        generated.pop("description", None)  # the class's docstring is for programmers
        return generated


class Stop:
    """Tells work in a thread that nobody waits for it any more."""

    def __init__(self, deadline: Deadline) -> None:
        self._event = threading.Event()
        self._deadline = deadline
        self._lock = threading.Lock()
        self._actions: list[Callable[[], object]] = []

    @property
    def deadline(self) -> Deadline:
        return self._deadline

    def set(self) -> None:
        """Say so, once and for good; runs the actions of `on_set`."""
        with self._lock:  # held while they run, so that `forget` can promise what it does
            self._event.set()
            for action in self._actions:
                action()
            self._actions.clear()

    def on_set(self, action: Callable[[], object]) -> None:
        """Call `action` when the work is no longer wanted (at once, if it is already): to wake a wait."""
        with self._lock:
            if not self._event.is_set():
                self._actions.append(action)
                return
        action()

    def forget(self, action: Callable[[], object]) -> None:
        """Take back `on_set`; after this returns, `action` will not be called."""
        with self._lock:
            if action in self._actions:
                self._actions.remove(action)

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the work is no longer wanted."""
        if self._event.is_set():
            raise Cancelled("the call was cancelled")
        self._deadline.check("the rest of the work")

    def pause(self, duration_s: float) -> None:
        """Wait, unless or until the work is no longer wanted; then raise as `check` does."""
        self._event.wait(min(duration_s, self._deadline.remaining_s))
        self.check()


async def in_thread(deadline: Deadline, work: Callable[[Stop], T], *, settle: bool = False) -> T:
    """Run blocking work beside the event loop; it must call `stop.check()` often.

    Args:
        settle: When cancelled, first wait until the work has noticed. For work that changes something, so
            that nothing changes after the caller was told the call is over.
    """
    stop = Stop(deadline)
    context = contextvars.copy_context()
    running = _threads().submit(context.run, _checked, work, stop)
    try:
        return await asyncio.shield(asyncio.wrap_future(running))
    except asyncio.CancelledError:
        stop.set()
        if settle and not running.cancel():
            finished = asyncio.get_running_loop().create_future()
            running.add_done_callback(lambda _: _resolve(finished))
            await finished
        raise


@cache
def _threads() -> ThreadPoolExecutor:
    # Not the event loop's own pool, which name resolution and others share: tools may fill theirs.
    return ThreadPoolExecutor(32, thread_name_prefix="tool")


def _checked(work: Callable[[Stop], T], stop: Stop) -> T:
    stop.check()
    return work(stop)


def _resolve(finished: asyncio.Future[None]) -> None:
    """Resolve a future from another thread; its loop may be gone, and then nobody waits."""

    def resolve() -> None:
        if not finished.done():
            finished.set_result(None)

    with suppress(RuntimeError):
        finished.get_loop().call_soon_threadsafe(resolve)


class PathRules:
    """The allowed and forbidden paths of a scope, as gitignore patterns.

    Paths are as tools print them: relative to the single root, or `ROOTNAME/relative` with several. With
    several roots a pattern whose first component names a root is held against the whole printed path; any
    other pattern is relative to each root. Forbidden wins, and a forbidden pattern that could be read both
    ways is read both ways. An empty allow-list allows all.

    Raises:
        InvalidInput: a pattern is malformed.
    """

    def __init__(self, scope: ToolScope) -> None:
        names = frozenset(scope.roots) if len(scope.roots) > 1 else frozenset[str]()
        self._rooted = bool(names)
        self._allowed = _compiled(tuple(scope.paths_allowed), names, False)
        self._forbidden = _compiled(tuple(scope.paths_forbidden), names, True)
        self.restricted = bool(scope.paths_allowed)

    def forbids(self, path: str, *, folder: bool = False) -> bool:
        """Whether a forbidden pattern covers this path (a forbidden folder covers all below it)."""
        return self._matches(self._forbidden, path, folder)

    def allows(self, path: str, *, folder: bool = False) -> bool:
        """Whether tools may touch this path."""
        return not self.forbids(path, folder=folder) and (
            not self.restricted or self._matches(self._allowed, path, folder)
        )

    def _matches(self, specs: tuple[GitIgnoreSpec, GitIgnoreSpec], path: str, folder: bool) -> bool:
        whole, relative = specs
        end = "/" if folder else ""
        if not self._rooted:
            return relative.match_file(path + end)
        _, _, below = path.partition("/")
        return whole.match_file(path + end) or (bool(below) and relative.match_file(below + end))


@lru_cache(maxsize=256)
def _compiled(
    patterns: tuple[str, ...], names: frozenset[str], both: bool
) -> tuple[GitIgnoreSpec, GitIgnoreSpec]:
    """(patterns that name a root, patterns relative to every root); `both`: the former are the latter too."""
    from pathspec import GitIgnoreSpec

    whole: list[str] = []
    relative: list[str] = []
    for pattern in patterns:
        sign = "!" if pattern.startswith("!") else ""
        bare = pattern[len(sign) :].lstrip("/")
        named = bare.partition("/")[0] in names
        if named:
            whole.append(f"{sign}/{bare}")
        if both or not named:
            relative.append(pattern)
    try:
        return GitIgnoreSpec.from_lines(whole), GitIgnoreSpec.from_lines(relative)
    except ValueError as error:
        raise InvalidInput(
            f"one of the path patterns {list(patterns)!r} is malformed: {error}",
            hint="use gitignore syntax, as in 'docs/**' or '*.key'",
        ) from None
