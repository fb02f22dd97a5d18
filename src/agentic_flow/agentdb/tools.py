"""memory_search: what an agent finds in the shared memory, with the place each passage came from."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
from pydantic import Field, StringConstraints

from agentic_flow.core.errors import Forbidden, InvalidInput
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.toolkit import PathRules, Tool, ToolCall, ToolInput
from agentic_flow.core.vectors import Filter, Hit, SearchQuery

HIT_TEXT_CHARS_MAX = 6000

_ENVELOPE_BYTES = 512
_PATHS_MAX = 50_000


class MemorySearch(ToolInput):
    query: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=4000),
        Field(description="What to look for: a question or words."),
    ]
    k: Annotated[int, Field(ge=1, le=50, description="Most passages to return.")] = 8
    path: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | None,
        Field(description="Only documents at this path, below this folder, or fitting this glob ('*.py')."),
    ] = None
    namespace: Annotated[
        Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._:-]{0,127}$")] | None,
        Field(description="Memory to search. Leave it out inside a run."),
    ] = None


def memory_tools(store: VectorStore) -> list[Tool[Any]]:
    """The tools over one store. The tenant is always the caller's."""

    async def memory_search(call: ToolCall[MemorySearch]) -> JsonObject:
        namespace = _namespace(call)
        where: Filter | None = None
        if call.arguments.path is not None:
            paths = await _paths(store, call.principal.tenant, namespace, call.arguments.path)
            if not paths:
                return {"hits": [], "embedder": "", "semantic": False, "note": "no document has such a path"}
            where = {"path": paths[0]} if len(paths) == 1 else {"path": {"in": paths}}
        found = await store.search(
            call.principal.tenant,
            namespace,
            SearchQuery(text=call.arguments.query, k=call.arguments.k, filter=where),
        )
        rules = PathRules(call.scope)
        permitted = [hit for hit in found.hits if _permitted(rules, hit)]
        hits, truncated = _fitting(permitted, call.result_max_bytes - _ENVELOPE_BYTES)
        result: JsonObject = {
            "hits": hits,
            "embedder": found.embedder_id,
            "semantic": found.semantic,
            "truncated": truncated,
        }
        if truncated:
            result["more"] = "some texts were cut or left out: read their lines with file_read"
        return result

    return [
        Tool(
            "memory_search",
            "Search the shared memory by meaning and words. Returns passages, best first, each with path, "
            "line_start, line_end, symbol, text and score.",
            MemorySearch,
            memory_search,
        )
    ]


def _namespace(call: ToolCall[MemorySearch]) -> str:
    asked, own = call.arguments.namespace, call.scope.namespace
    if own is not None:
        if asked not in (None, own):
            # Another namespace may hold what this run's path rules forbid.
            raise Forbidden(
                f"this run may search its own memory only, not {asked!r}", hint="leave namespace out"
            )
        return own
    if asked is None:
        raise InvalidInput("no namespace was given and the caller has none", hint="name one in namespace")
    return asked


async def _paths(store: VectorStore, tenant: str, namespace: str, pattern: str) -> list[str]:
    """The documents that the `path` argument means."""
    from pathspec import GitIgnoreSpec

    known = await store.fingerprints(tenant, namespace)
    plain = pattern.strip("/")
    if plain in known:
        return [plain]
    try:
        spec = GitIgnoreSpec.from_lines([pattern])
    except ValueError as error:
        raise InvalidInput(f"path {pattern!r} is no glob: {error}", hint="use one like '*.py'") from None
    paths = sorted(path for path in known if path.startswith(f"{plain}/") or spec.match_file(path))
    if len(paths) > _PATHS_MAX:
        raise InvalidInput(f"path {pattern!r} fits {len(paths)} documents", hint="narrow it")
    return paths


def _permitted(rules: PathRules, hit: Hit) -> bool:
    path = hit.item.metadata.get("path")
    return not isinstance(path, str) or rules.allows(path)


def _fitting(hits: list[Hit], max_bytes: int) -> tuple[list[JsonObject], bool]:
    """The hits, best first, as far as they fit; whether a text was cut or a hit left out."""
    shown: list[JsonObject] = []
    truncated = False
    left = max_bytes
    for hit in hits:
        metadata = hit.item.metadata
        entry: JsonObject = {
            "path": metadata.get("path", hit.item.id),
            "line_start": metadata.get("line_start"),
            "line_end": metadata.get("line_end"),
            "symbol": metadata.get("symbol"),
            "text": hit.item.text[:HIT_TEXT_CHARS_MAX],
            "score": round(hit.score, 6),
        }
        if len(hit.item.text) > HIT_TEXT_CHARS_MAX:
            entry["text_truncated"] = truncated = True
        size = len(orjson.dumps(entry)) + 1
        if size > left:
            return shown, True
        left -= size
        shown.append(entry)
    return shown, truncated
