"""What the `memory` commands share: the memory and whose it is, and words for people."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from agentic_flow.cli.session import Session

if TYPE_CHECKING:
    from agentic_flow.core.auth import Principal
    from agentic_flow.memory.answers import MemoryService

T = TypeVar("T")

TenantOption = Annotated[
    str | None,
    typer.Option("--tenant", help="Whose memory. [default: the owner's]", metavar="NAME"),
]
ItemArgument = Annotated[
    str, typer.Argument(help="Id of the item, as `memory items` prints it.", metavar="ITEM")
]
CursorOption = Annotated[
    str | None, typer.Option("--cursor", help="Where the last page ended.", metavar="CURSOR")
]
LimitOption = Annotated[int, typer.Option("--limit", help="Most rows.", metavar="N", min=1, max=1000)]


def on_memory(
    session: Session, tenant: str | None, work: Callable[[MemoryService, Principal], Awaitable[T]]
) -> T:
    """Run `work` with the configured memory (in this process, or a service) and the tenant's principal.

    Raises:
        InvalidInput: a tenant was chosen and memory is a service: the key decides there.
    """
    from agentic_flow.core.auth import Principal
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.build import Runtime

    async def run() -> T:
        async with Runtime(session.start()) as runtime:
            principal = runtime.principal
            if tenant is not None:
                if any(runtime.peer_url(peer) is not None for peer in ("platform", "agentdb")):
                    raise InvalidInput(
                        f"the tenant {tenant!r} cannot be chosen: memory is a service",
                        hint="there, the key of peers.token_file says whose it is: use one of that tenant",
                    )
                principal = Principal(tenant, principal.subject, principal.scopes)
            return await work(await runtime.memory(), principal)

    return asyncio.run(run())


def share(value: float) -> str:
    """0.873 → `87 %`."""
    return f"{value:.0%}".replace("%", " %")


def age(at_s: float | None, now_s: float) -> str:
    """How long ago, in the largest unit that fits."""
    if not at_s:
        return "-"
    passed_s = max(0.0, now_s - at_s)
    for size_s, name in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if passed_s >= size_s:
            return f"{passed_s / size_s:.0f} {name}"
    return f"{passed_s:.0f} s"


def head(text: str, chars: int) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= chars else f"{line[: chars - 1]}…"


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 item`, `2 items`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
