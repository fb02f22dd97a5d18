"""Embedders by name: the built-in ones and those of other distributions, made and ended in one place.

    [project.entry-points."agentic_flow.embedders"]
    my-embedder = "my_package.embedders:make"        # (AgentDBSettings) -> Embedder

A factory does not wait and opens nothing. An embedder that must ask somebody before its `dimension` is known
has an async `prepare`; one that holds connections or memory has an async `close`. Who makes an embedder with
`open_embedder` also ends it; a store only uses what it is given.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

from agentic_flow.core.errors import AgenticFlowError, InvalidInput, InvalidSettings
from agentic_flow.core.ports import Embedder
from agentic_flow.core.settings import AgentDBSettings

Factory = Callable[[AgentDBSettings], Embedder]

_PARTS = ("id", "dimension", "semantic", "embed")


@runtime_checkable
class Preparing(Protocol):
    """An embedder that learns its dimension before it is used."""

    async def prepare(self) -> None:
        """Make `id` and `dimension` known. Idempotent."""
        ...


@runtime_checkable
class Closable(Protocol):
    """An embedder that holds something."""

    async def close(self) -> None:
        """Let it go. Idempotent."""
        ...


def hashed_ngram(settings: AgentDBSettings) -> Embedder:
    """Words and character n-grams: no download, the same on every machine, likeness of spelling only."""
    from agentic_flow.agentdb.embedding import HashedNgramEmbedder

    return HashedNgramEmbedder(settings.embedding_dimension)


def openai(settings: AgentDBSettings) -> Embedder:
    """Any endpoint that speaks OpenAI Embeddings."""
    from agentic_flow.agentdb.embedders.openai import OpenAIEmbedder

    return OpenAIEmbedder(settings.embedding)


def onnx_minilm(settings: AgentDBSettings) -> Embedder:
    """all-MiniLM-L6-v2 on this machine's CPU."""
    from agentic_flow.agentdb.embedders.onnx_minilm import MiniLmEmbedder

    return MiniLmEmbedder()


BUILT_IN: Mapping[str, Factory] = {
    "hashed-ngram": hashed_ngram,
    "onnx-minilm": onnx_minilm,
    "openai": openai,
}


def make_embedder(settings: AgentDBSettings, extra: Mapping[str, Factory] | None = None) -> Embedder:
    """The embedder that `settings.embedder` names. `prepare` it, where it has that, before it is used.

    Args:
        settings: The section that factories read.
        extra: Factories of other distributions; one may replace a built-in one of the same name.

    Raises:
        InvalidInput: no embedder has this name.
        InvalidSettings: it cannot be made from these settings, or not from what is installed.
    """
    known = {**BUILT_IN, **(extra or {})}
    name = settings.embedder
    if name not in known:
        raise InvalidInput(
            f"there is no embedder {name!r}",
            hint=f"set agentdb.embedder to one of: {', '.join(sorted(known))}",
        )
    try:
        embedder = known[name](settings)
    except AgenticFlowError:
        raise
    except Exception as error:  # a stranger's factory may raise anything
        raise InvalidSettings(
            f"the embedder {name!r} cannot be made: {type(error).__name__}: {error}",
            hint="repair or uninstall the distribution that brings it, or choose another embedder",
        ) from error
    # On the class: the value of a property may not be known yet, and asking for it would raise.
    missing = [part for part in _PARTS if not (hasattr(type(embedder), part) or part in _own(embedder))]
    if missing:
        raise InvalidSettings(
            f"what the embedder {name!r} made is no embedder: {type(embedder).__name__!r} lacks "
            f"{', '.join(missing)}",
            hint="see Embedder in agentic_flow.core.ports for what one has",
        )
    return embedder


@asynccontextmanager
async def open_embedder(
    settings: AgentDBSettings, extra: Mapping[str, Factory] | None = None
) -> AsyncGenerator[Embedder]:
    """The embedder of `make_embedder`, prepared; closed on exit.

    Raises:
        AgenticFlowError: as `make_embedder`, or what `prepare` met.
    """
    embedder = make_embedder(settings, extra)
    try:
        if isinstance(embedder, Preparing):
            await embedder.prepare()
        yield embedder
    finally:
        if isinstance(embedder, Closable):
            await embedder.close()


def _own(embedder: object) -> Mapping[str, object]:
    return getattr(embedder, "__dict__", {})
