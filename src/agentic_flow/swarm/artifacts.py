"""The artifacts of a run: files that its steps leave for whoever asked for it, and for each other.

What a step leaves is staged while it executes and stored by the transaction that records it
(`artifact_rows`), so a step that runs again after a crash leaves it once. A second one of the same name is a
new version; the earlier ones are kept, because a retry from an earlier step goes on with them. Nobody
replaces what another agent has left without saying which version it saw.

The limits of a run count what is stored and what is staged by steps under way: all steps of a run are
executed by one process at a time, which keeps the list of the latter (`Staged`).
"""

from __future__ import annotations

import asyncio
import mimetypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import ref

from agentic_flow.core.errors import Conflict, InvalidInput, LimitExceeded, NotFound, TooLarge
from agentic_flow.core.ports import ArtifactRecord, NewArtifact, RunEngine, StepContext
from agentic_flow.core.settings import SwarmSettings

NAME_CHARS_MAX = 200
_PART_BYTES_MAX = 255
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,63}/[a-z0-9][a-z0-9!#$&^_.+-]{0,63}")
_ATTEMPT = re.compile(r"\.try-\d+(?=\.|$)")
_BINARY = "application/octet-stream"
_NO_FILES: tuple[str, ...] = ()
_TYPES = mimetypes.MimeTypes(_NO_FILES)  # not the machine's own list, which differs from machine to machine
for _ending, _type in {
    ".jsonl": "application/jsonl",
    ".log": "text/plain",
    ".md": "text/markdown",
    ".toml": "application/toml",
    ".webp": "image/webp",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}.items():
    _TYPES.add_type(_type, _ending)


def check_name(name: str) -> str:
    """The name, if it is a relative path that names the same file everywhere.

    Raises:
        InvalidInput: it is empty, absolute, too long, climbs, or holds what a file name should not.
    """
    why = _wrong(name)
    if why is not None:
        shown = repr(name if len(name) <= NAME_CHARS_MAX else f"{name[:NAME_CHARS_MAX]}…")
        raise InvalidInput(
            f"the artifact name {shown} {why}", hint="name it like a file: 'report.md', 'plots/a.png'"
        )
    return name


def _wrong(name: str) -> str | None:
    if not 0 < len(name) <= NAME_CHARS_MAX:
        return f"has {len(name)} characters, not 1 to {NAME_CHARS_MAX}"
    if not name.isprintable() or "\\" in name:
        return "holds a backslash or a character that cannot be printed"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return f"has {part!r} for a part"
        if part != part.strip() or len(part.encode()) > _PART_BYTES_MAX:
            return f"has a part with a space at its ends, or above {_PART_BYTES_MAX} bytes"
    return None


def media_type_of(name: str, given: str | None, *, text: bool) -> str:
    """What an artifact is served as: what was given, or what its name says.

    Raises:
        InvalidInput: what was given is no media type (parameters, as in `; charset=…`, are not kept).
    """
    if given is None:
        guessed, encoding = _TYPES.guess_type(f"file:{name}", strict=True)
        if encoding is not None:  # of a compressed file the name tells what is inside
            return _BINARY
        return guessed or ("text/plain" if text else _BINARY)
    if _MEDIA_TYPE.fullmatch(given) is None:
        raise InvalidInput(
            f"the media type {given[:100]!r} is none", hint="write it like 'text/markdown' or 'image/png'"
        )
    return given


@dataclass(frozen=True, slots=True)
class _Entry:
    """A version of a name, stored or staged."""

    name: str
    workflow_id: str
    media_type: str
    size_bytes: int
    sha256: str


class Staged:
    """What steps of one run have under way in this process.

    An entry is good for as long as its step executes: then it is stored, or was refused with its step.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], tuple[ref[StepContext], _Entry]] = {}

    def put(self, step: StepContext, entry: _Entry) -> None:
        """A step leaves this, in place of what it has left under the name."""
        self._entries[step.idempotency_key, entry.name] = (ref(step), entry)

    def drop(self, step: StepContext, name: str) -> None:
        """A step leaves nothing under this name after all."""
        self._entries.pop((step.idempotency_key, name), None)

    def over(self) -> set[tuple[str, str]]:
        """Those whose step has ended: whoever reads the store from now on finds them there, or never."""
        return {key for key, (step, _) in self._entries.items() if step() is None}

    def besides(self, stored: Sequence[ArtifactRecord], over: set[tuple[str, str]]) -> list[_Entry]:
        """Those that are not stored yet.

        Args:
            stored: What the store had.
            over: What `over` said before the store was read.
        """
        for key in over | {(f"{one.workflow_id}:{one.index}", one.name) for one in stored}:
            self._entries.pop(key, None)
        return [entry for _, entry in self._entries.values()]


@dataclass(frozen=True, slots=True)
class Left:
    """What became of an artifact. `is_new` False: the newest version of its name is the same."""

    name: str
    version: int
    media_type: str
    size_bytes: int
    sha256: str
    is_new: bool


class StepArtifacts:
    """The artifacts of a run as one step of it reads and leaves them: the `RunArtifacts` of tools.

    Args:
        engine: Where they are.
        settings: The section `swarm`, with the limits.
        step: The step, which executes now.
        staged: What other steps of the run have under way.
    """

    def __init__(self, engine: RunEngine, settings: SwarmSettings, step: StepContext, staged: Staged) -> None:
        self._engine = engine
        self._settings = settings
        self._step = step
        self._staged = staged
        self._workflow_id = step.idempotency_key.rpartition(":")[0]
        self._root_id = self._workflow_id.partition(".")[0]

    @property
    def max_bytes(self) -> int:
        """Of one artifact."""
        return self._settings.artifact_max_bytes

    async def every(self) -> list[ArtifactRecord]:
        """What is stored of the run's, every version, in order of storing."""
        return await self._engine.artifacts(self._root_id)

    async def content(self, record: ArtifactRecord) -> bytes:
        """The bytes of one of them.

        Raises:
            NotFound: it is gone.
            DataCorrupted: its bytes are not those that were stored.
        """
        found = await self._engine.artifact_content(self._root_id, record.number)
        if found is None:
            raise NotFound(f"artifact {record.name!r} is gone", hint="its run has been removed")
        return found

    async def leave(
        self, artifact: NewArtifact, *, expected_version: int | None = None, replaces_others: bool = False
    ) -> Left:
        """Leave something with the step: stored when the step is, as the next version of its name.

        Args:
            artifact: The name, the media type and the bytes.
            expected_version: The version that is there; 0: none. None: whatever this agent itself left.
            replaces_others: Without `expected_version` what others left may be replaced too.

        Raises:
            InvalidInput: the name is none.
            TooLarge: it has too many bytes.
            LimitExceeded: the run has too many artifacts, or too many bytes of them.
            Conflict: another version is there than was expected; or the name is a folder of other names.
        """
        name = check_name(artifact.name)
        size_bytes = len(artifact.content)
        if size_bytes > self.max_bytes:
            raise TooLarge(
                f"artifact {name!r} has {size_bytes:,} bytes, and at most {self.max_bytes:,} are kept",
                hint="leave less, split it, or have the operator raise swarm.artifact_max_bytes",
            )
        sha256 = await asyncio.to_thread(lambda: artifact.sha256)
        over = self._staged.over()
        stored = await self.every()
        # From here on nothing waits: what other steps stage meanwhile would not be counted.
        self._staged.drop(self._step, name)
        kept = [
            _Entry(one.name, one.workflow_id, one.media_type, one.size_bytes, one.sha256) for one in stored
        ] + self._staged.besides(stored, over)
        versions = [entry for entry in kept if entry.name == name]
        if not replaces_others or expected_version is not None:
            self._check_version(name, versions, expected_version)
        if versions and (versions[-1].sha256, versions[-1].media_type) == (sha256, artifact.media_type):
            return Left(name, len(versions), artifact.media_type, size_bytes, sha256, is_new=False)
        self._check_room(name, size_bytes, kept)
        entry = _Entry(name, self._workflow_id, artifact.media_type, size_bytes, sha256)
        self._staged.put(self._step, entry)
        self._step.artifacts.append(artifact)
        return Left(name, len(versions) + 1, artifact.media_type, size_bytes, sha256, is_new=True)

    def discard(self) -> None:
        """Leave nothing with this step after all."""
        for artifact in self._step.artifacts:
            self._staged.drop(self._step, artifact.name)
        self._step.artifacts.clear()

    def _check_version(self, name: str, versions: Sequence[_Entry], expected: int | None) -> None:
        there = len(versions)
        if expected is not None:
            if expected != there:
                raise Conflict(
                    f"artifact {name!r} is at version {there}, not at {expected}",
                    hint="read it with artifact_read, bring yours together with what is there, write again",
                )
        elif versions and _agent(versions[-1].workflow_id) != _agent(self._workflow_id):
            by = _agent(versions[-1].workflow_id) or "run"
            raise Conflict(
                f"artifact {name!r} is there already, left by {by!r}",
                hint=f"choose another name, or replace it with expected_version={there}",
            )

    def _check_room(self, name: str, size_bytes: int, kept: Sequence[_Entry]) -> None:
        settings = self._settings
        if len(kept) >= settings.artifacts_max:
            raise LimitExceeded(
                f"the run has {len(kept)} artifacts, versions included, which is all it may have",
                hint="put several files into one archive, or have the operator raise swarm.artifacts_max",
            )
        total = sum(entry.size_bytes for entry in kept)
        if total + size_bytes > settings.artifacts_max_bytes:
            raise LimitExceeded(
                f"artifact {name!r} has {size_bytes:,} bytes, and the run's others, versions included, "
                f"{total:,} of {settings.artifacts_max_bytes:,}",
                hint="leave less, or have the operator raise swarm.artifacts_max_bytes",
            )
        for other in {entry.name for entry in kept}:
            if other.startswith(f"{name}/") or name.startswith(f"{other}/"):
                raise Conflict(
                    f"the names {name!r} and {other!r} cannot be files of one folder",
                    hint="a name cannot also be a folder: choose another one",
                )


def newest(records: Sequence[ArtifactRecord]) -> list[ArtifactRecord]:
    """The last version of each name, by name."""
    last = {record.name: record for record in records}
    return [last[name] for name in sorted(last)]


def version_of(records: Sequence[ArtifactRecord], name: str, version: int | None) -> ArtifactRecord:
    """A version of a name; None: the last.

    Raises:
        NotFound: there is none.
    """
    of_name = [record for record in records if record.name == name]
    found = of_name[-1:] if version is None else [one for one in of_name if one.version == version]
    if found:
        return found[0]
    what = f"{name!r}" if version is None or not of_name else f"{name!r} in version {version}"
    names = [record.name for record in newest(records)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    hint = f"there are {', '.join(names[:20])}{more}" if names else "the run has left none"
    raise NotFound(f"there is no artifact {what[:NAME_CHARS_MAX]}", hint=hint)


def _agent(workflow_id: str) -> str:
    """Who a workflow is in its run; the attempts of a step are one and the same."""
    return _ATTEMPT.sub("", workflow_id.partition(".")[2])
