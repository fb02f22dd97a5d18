"""What the `db` commands share: the store and the tenant they work on, progress bars, words as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from agentic_flow.cli.session import Session

if TYPE_CHECKING:
    from agentic_flow.core.ports import VectorStore
    from agentic_flow.core.vectors import Vector

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""Takes how much is done and how much there is."""

NamespaceArgument = Annotated[str, typer.Argument(help="Name of the namespace.", metavar="NAME")]
TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", help="Whose data. [default: the owner's]", metavar="NAME"),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where", help='Metadata filter, a JSON object such as \'{"lang": "py"}\'.', metavar="JSON"
    ),
]


def on_store(session: Session, tenant: str | None, work: Callable[[VectorStore, str], Awaitable[T]]) -> T:
    """Run `work` with the configured store (embedded, PostgreSQL or a service) and the tenant.

    Raises:
        InvalidInput: a tenant was chosen and the database is a service: the key decides there.
    """
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.build import Runtime

    async def run() -> T:
        async with Runtime(session.start()) as runtime:
            if tenant is not None and runtime.peer_url("agentdb") is not None:
                raise InvalidInput(
                    f"the tenant {tenant!r} cannot be chosen: the database is a service",
                    hint="there, the key of peers.token_file says whose data it is: use a key of that tenant",
                )
            return await work(await runtime.store(), tenant or runtime.principal.tenant)

    return asyncio.run(run())


def read_where(text: str | None) -> dict[str, Any] | None:
    """The filter of `--where`."""
    return None if text is None else read_object(text, "--where")


def read_object(text: str, option: str) -> dict[str, Any]:
    """A JSON object given as a word.

    Raises:
        InvalidInput: it is none.
    """
    import orjson

    from agentic_flow.core.errors import InvalidInput

    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            f"{option} {text!r} is no JSON: {error}", hint="quote it for the shell: '{\"a\": 1}'"
        ) from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{option} {text!r} is no JSON object", hint="give one such as '{\"a\": 1}'")
    return cast(dict[str, Any], value)


def read_vector(path: Path | None) -> Vector | None:
    """The vector in a file: a JSON list of numbers, or one array in numpy's format (.npy).

    Raises:
        PathNotFound: it cannot be read.
        InvalidInput: it holds no vector.
    """
    if path is None:
        return None
    import orjson

    from agentic_flow.core.errors import InvalidInput, PathNotFound
    from agentic_flow.core.vectors import Vector

    try:
        data = path.read_bytes()
    except OSError as error:
        raise PathNotFound(f"{str(path)!r} cannot be read: {error.strerror}", hint="check the path") from None
    try:
        if data.startswith(b"\x93NUMPY"):
            import io

            import numpy as np

            return Vector.read(np.load(io.BytesIO(data), allow_pickle=False))
        return Vector.read(orjson.loads(data))
    except ValueError as error:
        raise InvalidInput(
            f"{str(path)!r} holds no vector: {error}", hint="a JSON list of numbers, or .npy"
        ) from None


def read_time(text: str | None, option: str) -> float | None:
    """Unix seconds, or a time in ISO 8601 (of this machine's zone where it names none).

    Raises:
        InvalidInput: it is neither.
    """
    from datetime import datetime

    from agentic_flow.core.errors import InvalidInput

    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return float(text)
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise InvalidInput(
            f"{option} {text!r} is no time", hint="give Unix seconds, or a time such as 2026-11-24T12:00Z"
        ) from None


@contextlib.contextmanager
def progress_bars() -> Generator[Callable[[str, int, int], None]]:
    """A bar for each label, on stderr; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from agentic_flow.cli.output import console

    bars: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(sys.stderr)) as progress:

        def advance(label: str, done: int, total: int) -> None:
            if label not in bars:
                bars[label] = progress.add_task(label, total=total or None)
            progress.update(bars[label], completed=done, total=total or None)

        yield advance


@contextlib.contextmanager
def progress_bar(label: str) -> Generator[Progress]:
    """One bar; see `progress_bars`."""
    with progress_bars() as advance:
        yield lambda done, total: advance(label, done, total)


def size(size_bytes: int | None) -> str:
    """A number of bytes as people read it."""
    if size_bytes is None:
        return "unknown"
    power = min(4, max(0, size_bytes.bit_length() - 1) // 10)
    return f"{size_bytes} B" if power == 0 else f"{size_bytes / 1024**power:.1f} {'KMGT'[power - 1]}iB"


def head(text: str, most: int = 70) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
