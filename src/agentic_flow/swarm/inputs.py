"""The folders of a run: how inputs become roots, how they get into memory, how cited lines are read again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentic_flow.agentdb.ingest import IngestReport, ingest
from agentic_flow.core.errors import PathNotFound
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import ToolScope, VectorStore
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.swarm.runs import RunSpec

_CITED_FILE_MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Folder:
    """The inputs of one run as its tools see them.

    Args:
        roots: Name → real folder. With one root, paths are relative to it; with several they start with
            the root's name.
        namespace: Where the contents live in memory. It depends on the roots and on the path rules, so
            what one run is forbidden to see cannot reach it through what another run read in.
        paths_allowed: gitignore-style patterns; empty allows all.
        paths_forbidden: Likewise; wins.
    """

    roots: Mapping[str, Path]
    namespace: str
    paths_allowed: tuple[str, ...]
    paths_forbidden: tuple[str, ...]

    @classmethod
    def of(cls, spec: RunSpec) -> Folder:
        """The folder of a run's inputs. A file becomes its parent folder with only that file allowed.

        Raises:
            PathNotFound: an input does not exist or cannot be read.
        """
        places = [_existing(Path(text)) for text in spec.inputs]
        parents = dict.fromkeys(place if place.is_dir() else place.parent for place in places)
        roots: dict[str, Path] = {}
        for parent in parents:
            name = parent.name or "root"
            while name in roots:
                name += "_"
            roots[name] = parent
        allowed = list(spec.paths_allowed)
        if any(place.is_file() for place in places):
            prefix = {path: f"/{name}" if len(roots) > 1 else "" for name, path in roots.items()}
            allowed += [
                f"{prefix[place]}/**" if place.is_dir() else f"{prefix[place.parent]}/{place.name}"
                for place in places
            ]
        key = "\0".join([*(str(place) for place in roots.values()), "", *allowed, "", *spec.paths_forbidden])
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(roots, f"input.{digest}", tuple(allowed), spec.paths_forbidden)

    def as_json(self) -> JsonObject:
        return {
            "roots": {name: str(path) for name, path in self.roots.items()},
            "namespace": self.namespace,
            "paths_allowed": list(self.paths_allowed),
            "paths_forbidden": list(self.paths_forbidden),
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Folder:
        return cls(
            {name: Path(path) for name, path in data["roots"].items()},
            data["namespace"],
            tuple(data["paths_allowed"]),
            tuple(data["paths_forbidden"]),
        )

    def scope(
        self, run_id: str, agent: str, tools: Sequence[str] = (), *, board: str | None = None
    ) -> ToolScope:
        """What this agent's tools may touch."""
        return ToolScope(
            roots=dict(self.roots),
            paths_allowed=self.paths_allowed,
            paths_forbidden=self.paths_forbidden,
            tools_allowed=frozenset(tools),
            namespace=self.namespace,
            run_id=run_id,
            agent=agent,
            board=board,
        )


class Inputs:
    """Reads a run's folder into memory and cited lines back out of the files."""

    def __init__(self, store: VectorStore, settings: AgentDBSettings) -> None:
        self._store = store
        self._settings = settings

    async def ingest(
        self, tenant: str, folder: Folder, progress: Callable[[int, int], None] | None
    ) -> IngestReport:
        """Bring the namespace up to date with the files; unchanged files are not read."""
        return await ingest(
            self._store,
            tenant,
            folder.namespace,
            folder.roots,
            settings=self._settings,
            paths_allowed=folder.paths_allowed,
            paths_forbidden=folder.paths_forbidden,
            progress=progress,
        )

    async def paths(self, tenant: str, folder: Folder) -> list[str]:
        """The paths that are in memory, sorted."""
        return sorted(await self._store.fingerprints(tenant, folder.namespace))

    def read_lines(self, folder: Folder, run_id: str) -> Callable[[str], Sequence[str]]:
        """A reader of cited files: confined like any tool, lines counted as ingestion counted them.

        Each file is read once per reader: a review cites few files many times.
        """
        from agentic_flow.agentdb.reading import text_of
        from agentic_flow.tools.confine import confined_read

        scope = folder.scope(run_id, "reviewer")
        cache: dict[str, list[str]] = {}

        def lines(path: str) -> Sequence[str]:
            if path not in cache:
                data = confined_read(scope, path, max_bytes=_CITED_FILE_MAX_BYTES)
                cache[path] = text_of(path, data).splitlines()
            return cache[path]

        return lines


def _existing(path: Path) -> Path:
    try:
        resolved = path.resolve(strict=True)
        if resolved.is_dir():
            next(resolved.iterdir(), None)
        else:
            with resolved.open("rb"):
                return resolved
    except OSError as error:
        raise PathNotFound(
            f"input {str(path)!r} cannot be read: {error.strerror}", hint="name an existing, readable path"
        ) from error
    return resolved
