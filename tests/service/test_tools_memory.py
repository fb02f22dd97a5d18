"""memory_search through the ToolBox, over a store that keeps tenants and namespaces apart."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from agentic_flow.agentdb.tools import HIT_TEXT_CHARS_MAX, memory_tools
from agentic_flow.core.auth import Principal
from agentic_flow.core.clock import Deadline
from agentic_flow.core.errors import NotFound
from agentic_flow.core.ports import ToolResult, ToolScope, VectorStore
from agentic_flow.core.settings import ToolsSettings
from agentic_flow.core.vectors import Fingerprint, Hit, Item, SearchQuery, SearchResult
from agentic_flow.tools.audit import AuditLog
from agentic_flow.tools.policy import Policy
from agentic_flow.tools.toolbox import StandardToolBox


class WordStore:
    """The two methods of VectorStore that the tool uses, ranking by shared words. Filters are real."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], list[Item]] = {}
        self.queries: list[SearchQuery] = []

    def put(self, tenant: str, namespace: str, path: str, text: str, line: int = 1) -> None:
        metadata = {"path": path, "line_start": line, "line_end": line + text.count("\n"), "symbol": "f"}
        item = Item(id=f"{path}#{line}", text=text, metadata=metadata)
        self.items.setdefault((tenant, namespace), []).append(item)

    def _of(self, tenant: str, namespace: str) -> list[Item]:
        if (tenant, namespace) not in self.items:
            raise NotFound(f"there is no namespace {namespace!r}")
        return self.items[tenant, namespace]

    async def fingerprints(self, tenant: str, namespace: str) -> dict[str, Fingerprint]:
        some = Fingerprint(size_bytes=1, mtime_ns=1, sha256="0")
        return {item.metadata["path"]: some for item in self._of(tenant, namespace)}

    async def search(self, tenant: str, namespace: str, query: SearchQuery) -> SearchResult:
        self.queries.append(query)
        wanted = (query.filter or {}).get("path")
        allowed = None if wanted is None else set(wanted["in"]) if isinstance(wanted, dict) else {wanted}
        words = set(query.text.split())
        hits = [
            Hit(item=item, score=float(len(words & set(item.text.split()))))
            for item in self._of(tenant, namespace)
            if allowed is None or item.metadata["path"] in allowed
        ]
        best = sorted((hit for hit in hits if hit.score), key=lambda hit: -hit.score)[: query.k]
        return SearchResult(hits=tuple(best), embedder_id="words-1", semantic=False, mode=query.mode)


class Bench:
    def __init__(self, audit: AuditLog) -> None:
        self.audit = audit
        self.store = WordStore()

    def call(
        self,
        *,
        tenant: str = "acme",
        scope: ToolScope | None = None,
        max_bytes: int = 65536,
        **arguments: Any,
    ) -> ToolResult:
        box = StandardToolBox(
            memory_tools(cast(VectorStore, self.store)),
            settings=ToolsSettings(result_max_bytes=max_bytes),
            policy=Policy(),
            audit=self.audit,
        )
        return asyncio.run(
            box.call(
                Principal(tenant, "worker"),
                "memory_search",
                arguments,
                deadline=Deadline.after(10),
                scope=scope or ToolScope(namespace="input.1"),
            )
        )


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    audit = AuditLog(tmp_path / "audit.db")
    bench = Bench(audit)
    for path, text in (
        ("src/a.py", "alpha beta"),
        ("src/deep/b.py", "alpha"),
        ("src2/c.md", "alpha beta gamma"),
        ("secret/d.md", "alpha beta gamma delta"),
    ):
        bench.store.put("acme", "input.1", path, text)
    bench.store.put("evil", "input.1", "loot.md", "alpha loot")
    bench.store.put("acme", "input.2", "other.md", "alpha other")
    yield bench
    audit.close()


def paths(result: ToolResult) -> list[str]:
    assert not result.is_error, result.content
    return [hit["path"] for hit in result.content["hits"]]


def test_hits_carry_their_place(bench: Bench) -> None:
    """Catches a hit that cannot be cited, a lost order, and an embedder that claims more than it is."""
    content = bench.call(query="alpha beta gamma", k=2).content
    assert [hit["path"] for hit in content["hits"]] == ["src2/c.md", "secret/d.md"]
    assert content["hits"][0] == {
        "path": "src2/c.md",
        "line_start": 1,
        "line_end": 1,
        "symbol": "f",
        "text": "alpha beta gamma",
        "score": 3.0,
    }
    assert (content["embedder"], content["semantic"]) == ("words-1", False)


def test_tenant_and_namespace_are_walls(bench: Bench) -> None:
    """Catches a search that another tenant's memory answers, or a run that reads another run's."""
    assert "loot.md" not in paths(bench.call(query="alpha loot"))
    assert paths(bench.call(tenant="evil", query="alpha")) == ["loot.md"]
    assert bench.call(tenant="nobody", query="alpha").content["code"] == "not_found"
    assert bench.call(query="alpha", namespace="input.2").content["code"] == "forbidden"
    assert paths(bench.call(query="alpha", namespace="input.1")) != []
    free = ToolScope()
    assert paths(bench.call(scope=free, query="alpha", namespace="input.2")) == ["other.md"]
    assert bench.call(scope=free, query="alpha").content["code"] == "invalid_input"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("src/a.py", {"src/a.py"}),
        ("src", {"src/a.py", "src/deep/b.py"}),
        ("src/", {"src/a.py", "src/deep/b.py"}),
        ("*.md", {"src2/c.md", "secret/d.md"}),
        ("src/**/*.py", {"src/a.py", "src/deep/b.py"}),
        ("none/*", set[str]()),
    ],
)
def test_path_narrows(bench: Bench, pattern: str, found: set[str]) -> None:
    """Catches a path filter that is ignored, or a prefix that also takes its neighbours (src, src2)."""
    assert set(paths(bench.call(query="alpha", path=pattern))) == found


def test_forbidden_paths_stay_out_of_memory_too(bench: Bench) -> None:
    """Catches a forbidden file whose text reaches the agent through memory."""
    scope = ToolScope(namespace="input.1", roots={"r": Path("/r")}, paths_forbidden=("secret/",))
    assert "secret" not in str(bench.call(scope=scope, query="alpha delta").content)
    scope = ToolScope(namespace="input.1", roots={"r": Path("/r")}, paths_allowed=("src/**",))
    assert set(paths(bench.call(scope=scope, query="alpha"))) == {"src/a.py", "src/deep/b.py"}


def test_long_texts_and_many_hits_are_bounded(bench: Bench) -> None:
    """Catches a result that the ToolBox has to cut blindly, and cuts that are not marked."""
    for number in range(50):
        bench.store.put("acme", "input.1", f"big{number}.md", "omega " + "x" * 10_000)
    result = bench.call(query="omega", k=50, max_bytes=32_768)
    assert result.truncated
    assert len(orjson.dumps(result.content)) <= 32_768
    assert 1 <= len(result.content["hits"]) < 50
    assert all(len(hit["text"]) == HIT_TEXT_CHARS_MAX for hit in result.content["hits"])
    assert all(hit["text_truncated"] for hit in result.content["hits"])
    assert "file_read" in result.content["more"]


@pytest.mark.parametrize("arguments", [{"query": " "}, {"query": "x", "k": 51}, {"query": "x", "k": 0}, {}])
def test_arguments_are_bounded(bench: Bench, arguments: dict[str, Any]) -> None:
    """Catches unbounded or empty searches."""
    assert bench.call(**arguments).content["code"] == "invalid_input"
