"""Tools by which the agents and steps of a run leave artifacts, and read those of the others.

They act on `ToolScope.artifacts`: the run's, as the step that calls sees them. What a call leaves is stored
with the record of the call. Every agent that is given these tools sees all artifacts of its run, whatever
its topology says of messages: they are the run's result, and no secret within it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from agentic_flow.core.errors import Forbidden
from agentic_flow.core.messages import JsonObject
from agentic_flow.core.ports import LeftArtifact, NewArtifact, RunArtifacts, ToolScope
from agentic_flow.core.toolkit import Stop, Tool, ToolCall, ToolInput, in_thread
from agentic_flow.swarm.artifacts import NAME_CHARS_MAX, check_name, media_type_of, newest, version_of
from agentic_flow.tools.confine import Confinement, read_descriptor
from agentic_flow.tools.file_arguments import CanonicalPath
from agentic_flow.tools.text import lines_of, page_of_lines, plain_text

TEXT_CHARS_MAX = 4 * 1024 * 1024
_ENVELOPE_BYTES = 1024

Name = Annotated[
    str, Field(max_length=NAME_CHARS_MAX, description="Its name: a relative path like 'plots/a.png'.")
]
MediaType = Annotated[
    str | None, Field(description="What it is, like 'text/markdown'. Default: what the name's ending says.")
]
ExpectedVersion = Annotated[
    int | None,
    Field(ge=0, description="Version to replace, 0 for a new name. Needed to replace another agent's."),
]
Line = Annotated[int, Field(ge=1, le=100_000_000)]


class ArtifactWrite(ToolInput):
    name: Name
    text: Annotated[str, Field(max_length=TEXT_CHARS_MAX, description="The whole content.")]
    media_type: MediaType = None
    expected_version: ExpectedVersion = None


class ArtifactSave(ToolInput):
    path: Annotated[CanonicalPath, Field(min_length=1, description="File to keep, as tools print it.")]
    name: Annotated[
        str | None, Field(max_length=NAME_CHARS_MAX, description="Its name. Default: the path.")
    ] = None
    media_type: MediaType = None
    expected_version: ExpectedVersion = None


class ArtifactList(ToolInput):
    """Takes nothing."""


class ArtifactRead(ToolInput):
    name: Name
    version: Annotated[int | None, Field(ge=1, description="Default: the newest.")] = None
    line_start: Annotated[Line, Field(description="First line, counted from 1.")] = 1
    line_end: Annotated[Line | None, Field(description="Last line, included. Default: the end.")] = None


def artifact_tools() -> list[Tool[Any]]:
    """The tools. The run is always the caller's."""

    async def artifact_write(call: ToolCall[ArtifactWrite]) -> JsonObject:
        asked = call.arguments
        name = check_name(asked.name)
        media_type = media_type_of(name, asked.media_type, text=True)
        artifact = NewArtifact(name, media_type, asked.text.encode())
        left = await artifacts_of(call.scope).leave(artifact, expected_version=asked.expected_version)
        return told(left)

    async def artifact_save(call: ToolCall[ArtifactSave]) -> JsonObject:
        asked, artifacts = call.arguments, artifacts_of(call.scope)
        name = check_name(asked.path if asked.name is None else asked.name)
        media_type = media_type_of(name, asked.media_type, text=False)
        content = await in_thread(call.deadline, lambda stop: _read(call, artifacts.max_bytes, stop))
        artifact = NewArtifact(name, media_type, content)
        return told(await artifacts.leave(artifact, expected_version=asked.expected_version))

    async def artifact_list(call: ToolCall[ArtifactList]) -> JsonObject:
        records = newest(await artifacts_of(call.scope).every())
        fields = ("name", "version", "media_type", "size_bytes", "sha256")
        return {
            "artifacts": [
                {field: getattr(record, field) for field in fields}
                | {"agent": record.workflow_id.partition(".")[2] or "run"}
                for record in records
            ]
        }

    async def artifact_read(call: ToolCall[ArtifactRead]) -> JsonObject:
        asked, artifacts = call.arguments, artifacts_of(call.scope)
        record = version_of(await artifacts.every(), asked.name, asked.version)
        lines = lines_of(plain_text(record.name, await artifacts.content(record)))
        page = page_of_lines(
            lines,
            asked.line_start,
            asked.line_end,
            max_bytes=max(call.result_max_bytes - _ENVELOPE_BYTES - 2 * NAME_CHARS_MAX, _ENVELOPE_BYTES),
        )
        shown: JsonObject = {"name": record.name, "version": record.version, "media_type": record.media_type}
        return shown | asdict(page) | {"lines_total": len(lines)}

    # They change nothing but what the run itself leaves, which its caller may take or not: no kind `write`,
    # which policies ask somebody about.
    return [
        Tool(
            "artifact_write",
            "Leave a text as a result of the run that can be downloaded, under a name like 'report.md'. The "
            "same name again makes a new version. Returns version, size_bytes and sha256.",
            ArtifactWrite,
            artifact_write,
            private_arguments=frozenset({"text"}),
        ),
        Tool(
            "artifact_save",
            "Leave a file of the folder, of any kind, as a result of the run that can be downloaded. Returns "
            "version, size_bytes and sha256.",
            ArtifactSave,
            artifact_save,
        ),
        Tool(
            "artifact_list",
            "List what the run's agents have left as results: name, version, media_type, size_bytes, sha256 "
            "and agent.",
            ArtifactList,
            artifact_list,
        ),
        Tool(
            "artifact_read",
            "Read a text that an agent of the run has left as a result, or a range of its lines. When "
            "truncated, call again with line_start after line_end.",
            ArtifactRead,
            artifact_read,
        ),
    ]


def artifacts_of(scope: ToolScope) -> RunArtifacts:
    """The caller's.

    Raises:
        Forbidden: it belongs to no run.
    """
    if scope.artifacts is None:
        raise Forbidden(
            "there are no artifacts here", hint="only the agents and steps of a run leave and read them"
        )
    return scope.artifacts


def told(left: LeftArtifact) -> JsonObject:
    """What a caller reads of what it has left."""
    return {
        "name": left.name,
        "version": left.version,
        "media_type": left.media_type,
        "size_bytes": left.size_bytes,
        "sha256": left.sha256,
        "is_new": left.is_new,
    }


def _read(call: ToolCall[ArtifactSave], max_bytes: int, stop: Stop) -> bytes:
    path = call.arguments.path
    confinement = Confinement(call.scope)
    with confinement.open_file(confinement.locate(path)) as (descriptor, status):
        return read_descriptor(
            descriptor, path, size_bytes=status.st_size, max_bytes=max_bytes, check=stop.check
        )
