"""The registry: tools by name, each once, and the right error for a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from agentic_flow.core.errors import NotFound
from agentic_flow.core.toolkit import Tool


class Registry:
    """Tools by name, iterated in name order. Two tools with one name are our own bug."""

    def __init__(self, tools: Iterable[Tool[Any]]) -> None:
        self._tools: dict[str, Tool[Any]] = {}
        for tool in sorted(tools, key=lambda tool: tool.name):
            assert tool.name not in self._tools, f"two tools are called {tool.name!r}"
            self._tools[tool.name] = tool

    def __iter__(self) -> Iterator[Tool[Any]]:
        return iter(self._tools.values())

    def __len__(self) -> int:
        return len(self._tools)

    def get(self, name: str, allowed: Collection[str] | None = None) -> Tool[Any]:
        """The tool of this name.

        Args:
            allowed: Names within reach; None for all.

        Raises:
            NotFound: there is none, or it is out of reach (the caller cannot tell which).
        """
        tool = self._tools.get(name)
        if tool is not None and (allowed is None or name in allowed):
            return tool
        known = [known for known in self._tools if allowed is None or known in allowed]
        close = difflib.get_close_matches(name[:100], known, n=1)
        raise NotFound(
            f"there is no tool {name[:100]!r} here",
            hint=f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known) or 'none'}",
        )
