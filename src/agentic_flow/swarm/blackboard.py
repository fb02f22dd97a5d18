"""The blackboard of a run: keys and short texts that agents of one room share, with compare-and-set.

A write says which version it saw and is refused when somebody was faster, so no agent overwrites what it has
not read. Entries are items of one namespace of the tenant's vector store: durable when the call returns, gone
with the tenant. Which agents have a board, and with whom they share it, the topology decides (`room`); the
tools see it as `ToolScope.board`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from pydantic import Field

from agentic_flow.core.errors import Conflict, Forbidden, LimitExceeded, NotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import ToolScope, VectorStore
from agentic_flow.core.toolkit import Tool, ToolCall, ToolInput
from agentic_flow.core.vectors import Item

NAMESPACE = "swarm.boards"
TOOLS = ("board_list", "board_read", "board_write")
VALUE_CHARS_MAX = 8000
KEYS_MAX = 200
_HEAD_CHARS = 120

Key = Annotated[
    str,
    Field(
        pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$", description="Name of the entry, like 'open-questions'."
    ),
]


class BoardList(ToolInput):
    """Takes nothing."""


class BoardRead(ToolInput):
    key: Key


class BoardWrite(ToolInput):
    key: Key
    value: Annotated[str, Field(max_length=VALUE_CHARS_MAX, description="The whole new text of the entry.")]
    expected_version: Annotated[
        int, Field(ge=0, description="Version that board_read gave; 0 for an entry that does not exist yet.")
    ]


def board_tools(store: VectorStore) -> list[Tool[Any]]:
    """The tools over one store. The tenant and the board are always the caller's."""

    async def board_list(call: ToolCall[BoardList]) -> JsonObject:
        items = await _entries(store, call.principal.tenant, board_of(call.scope))
        return {
            "entries": [
                {
                    "key": item.metadata["key"],
                    "version": item.version,
                    "author": item.metadata["author"],
                    "head": item.text[:_HEAD_CHARS],
                    "chars": len(item.text),
                }
                for item in items
            ]
        }

    async def board_read(call: ToolCall[BoardRead]) -> JsonObject:
        board, key = board_of(call.scope), call.arguments.key
        await store.create_namespace(call.principal.tenant, NAMESPACE)
        found = await store.get(call.principal.tenant, NAMESPACE, [_id(board, key)])
        if not found:
            raise NotFound(f"the board has no entry {key!r}", hint="board_list shows what it has")
        item = found[0]
        return {"key": key, "value": item.text, "version": item.version, "author": item.metadata["author"]}

    async def board_write(call: ToolCall[BoardWrite]) -> JsonObject:
        board, asked, tenant = board_of(call.scope), call.arguments, call.principal.tenant
        if asked.expected_version == 0 and len(await _entries(store, tenant, board)) >= KEYS_MAX:
            raise LimitExceeded(
                f"the board has {KEYS_MAX} entries, which is all it holds", hint="write into one of them"
            )
        await store.create_namespace(tenant, NAMESPACE)
        metadata = {"board": board, "key": asked.key, "author": call.scope.agent or ""}
        item = Item(id=_id(board, asked.key), text=asked.value, metadata=metadata)
        try:
            written = await store.upsert(
                tenant,
                NAMESPACE,
                [item],
                expected_version=asked.expected_version,
                idempotency_key=call.idempotency_key,
            )
        except Conflict:
            current = await store.get(tenant, NAMESPACE, [item.id])
            version = current[0].version if current else 0
            raise Conflict(
                f"entry {asked.key!r} is at version {version}, not at {asked.expected_version}",
                hint="read it with board_read, bring your text together with what is there, write again",
            ) from None
        return {"key": asked.key, "version": written.versions[0]}

    return [
        Tool(
            "board_list",
            "List the entries of the team's blackboard: key, version, author, the beginning of the text.",
            BoardList,
            board_list,
        ),
        Tool(
            "board_read", "Read one entry of the team's blackboard, with its version.", BoardRead, board_read
        ),
        Tool(
            "board_write",
            "Write one entry of the team's blackboard. Give the version you read; when somebody was faster "
            "it is refused, and you read again.",
            BoardWrite,
            board_write,
            # It changes nothing but the board that the run's caller opened to these agents.
            kind="read",
            idempotent=False,
        ),
    ]


def board_name(run_id: str, room: str) -> str:
    """The board of a room of a run; what `ToolScope.board` holds."""
    return f"{run_id}/{room}"


def board_of(scope: ToolScope) -> str:
    """The caller's board.

    Raises:
        Forbidden: it has none.
    """
    if scope.board is None:
        raise Forbidden(
            "there is no blackboard here", hint="the topology of the run gives this agent none; go on without"
        )
    return scope.board


async def clear_boards(store: VectorStore, tenant: str, is_gone: Callable[[str], Awaitable[bool]]) -> int:
    """Remove the boards of runs that are no more; the number of entries that went.

    Args:
        store: Where they are.
        tenant: Whose.
        is_gone: Whether there is no run of this id.
    """
    if NAMESPACE not in {namespace.name for namespace in await store.namespaces(tenant)}:
        return 0
    boards: set[str] = set()
    cursor: str | None = None
    while True:
        page = await store.list_items(tenant, NAMESPACE, limit=KEYS_MAX, cursor=cursor)
        boards |= {str(item.metadata["board"]) for item in page.items}
        if (cursor := page.cursor) is None:
            break
    gone = [run_id for run_id in {board.partition("/")[0] for board in boards} if await is_gone(run_id)]
    return sum(
        [
            await store.delete_where(tenant, NAMESPACE, {"board": board})
            for board in sorted(boards)
            if board.partition("/")[0] in gone
        ]
    )


async def _entries(store: VectorStore, tenant: str, board: str) -> list[Item]:
    await store.create_namespace(tenant, NAMESPACE)
    page = await store.list_items(tenant, NAMESPACE, where={"board": board}, limit=KEYS_MAX)
    return sorted(page.items, key=lambda item: str(item.metadata["key"]))


def _id(board: str, key: str) -> str:
    return hashlib.sha256(f"{board}\0{key}".encode()).hexdigest()
