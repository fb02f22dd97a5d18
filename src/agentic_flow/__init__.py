"""Agentic Flow: fleets of LLM agents that share a memory, cite their evidence and survive `kill -9`.

    from agentic_flow import Client

    with Client() as client:
        result = client.run("How does a task get cancelled?", input="src")

`Client` and `AsyncClient` are imported on first use, so that `import agentic_flow` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentic_flow.core.version import __version__

if TYPE_CHECKING:
    from agentic_flow.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("AsyncClient", "Client"):
        from agentic_flow import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
