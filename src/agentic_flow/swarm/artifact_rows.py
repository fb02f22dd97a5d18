"""Rows of the table of artifacts: what steps leave besides their results, with the bytes.

A row is written by the transaction that records its step, under the same fence: whoever sees the step has its
artifacts, and a replay makes none. Rows of a tree are numbered in the order of storing. The newest row of a
name is the artifact; the ones before it stay as its earlier versions, for a retry from an earlier step goes
on with those.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from agentic_flow.core.errors import DataCorrupted
from agentic_flow.core.ports import ArtifactRecord, NewArtifact
from agentic_flow.core.sql import Connection, execute

# ruff: noqa: S608 - what is interpolated into SQL here is constants; values are bound.

_COLUMNS = "step_index, step, name, media_type, size_bytes, sha256, created_at_s, content"
INSERT_ARTIFACT = (
    f"INSERT INTO af_artifacts (root_id, number, workflow_id, {_COLUMNS}) VALUES (:root_id, "
    "(SELECT COALESCE(MAX(number), 0) + 1 FROM af_artifacts WHERE root_id = :root_id), :workflow_id, "
    ":step_index, :step, :name, :media_type, :size_bytes, :sha256, :created_at_s, :content) "
    "ON CONFLICT DO NOTHING"
)
"""The conflict is with itself, when the answer to the first attempt got lost."""


def create_artifacts(*, sqlite: bool) -> str:
    """The statement that makes the table. The bytes are its last column: SQLite skips them in a list."""
    return f"""CREATE TABLE IF NOT EXISTS af_artifacts (
        root_id TEXT NOT NULL, number INTEGER NOT NULL, workflow_id TEXT NOT NULL,
        step_index INTEGER NOT NULL, step TEXT NOT NULL, name TEXT NOT NULL, media_type TEXT NOT NULL,
        size_bytes BIGINT NOT NULL, sha256 TEXT NOT NULL, created_at_s DOUBLE PRECISION NOT NULL,
        content {"BLOB" if sqlite else "BYTEA"} NOT NULL,
        PRIMARY KEY (root_id, number), UNIQUE (workflow_id, step_index, name))"""


def artifact_row(root_id: str, step: Mapping[str, Any], artifact: NewArtifact) -> dict[str, Any]:
    """What is bound to INSERT_ARTIFACT.

    Args:
        root_id: The top-level workflow.
        step: The row of the step that leaves it.
        artifact: What it leaves.
    """
    return {
        "root_id": root_id,
        "workflow_id": step["workflow_id"],
        "step_index": step["step_index"],
        "step": step["name"],
        "name": artifact.name,
        "media_type": artifact.media_type,
        "size_bytes": len(artifact.content),
        "sha256": artifact.sha256,
        "created_at_s": step["completed_at_s"],
        "content": artifact.content,
    }


def artifacts_of(connection: Connection, workflow_id: str) -> list[ArtifactRecord]:
    """What a workflow and everything below it has left, every version in order of storing."""
    found = execute(
        connection,
        "SELECT workflow_id, step_index, step, number, name, media_type, size_bytes, sha256, created_at_s "
        "FROM af_artifacts WHERE root_id = :root ORDER BY number",
        root=workflow_id.partition(".")[0],
    )
    versions = Counter[str]()
    records: list[ArtifactRecord] = []
    for by, index, step, number, name, media_type, size_bytes, sha256, created_at_s in found:
        versions[name] += 1  # of the whole run, whoever made them
        if by == workflow_id or str(by).startswith(f"{workflow_id}."):
            records.append(
                ArtifactRecord(
                    workflow_id=str(by),
                    index=int(index),
                    step=str(step),
                    number=int(number),
                    name=str(name),
                    version=versions[name],
                    media_type=str(media_type),
                    size_bytes=int(size_bytes),
                    sha256=str(sha256),
                    created_at_s=float(created_at_s),
                )
            )
    return records


def content_of(connection: Connection, workflow_id: str, number: int) -> bytes | None:
    """The bytes of one.

    Raises:
        DataCorrupted: they are not those that were stored.
    """
    row = execute(
        connection,
        "SELECT content, sha256, name FROM af_artifacts WHERE root_id = :root AND number = :number",
        root=workflow_id.partition(".")[0],
        number=number,
    ).first()
    if row is None:
        return None
    content = bytes(row[0])
    if hashlib.sha256(content).hexdigest() != row[1]:
        raise DataCorrupted(
            f"artifact {row[2]!r} of run {workflow_id!r} is not what was stored",
            hint="restore the run database from a backup",
        )
    return content


def copy_artifacts(
    connection: Connection,
    columns: str,
    as_new: Mapping[str, Any],
    where: str,
    bindings: Mapping[str, Any],
) -> None:
    """Give a new run those of another one that meet a condition, under its own id.

    Args:
        connection: In whose transaction.
        columns: Those that are copied as they are: all but the ids and the number.
        as_new: `new`, the new run's id, and `behind`, the length of the old one's plus 1.
        where: The condition.
        bindings: What is bound to it.
    """
    execute(
        connection,
        f"INSERT INTO af_artifacts (root_id, number, workflow_id, {columns}) SELECT CAST(:new AS TEXT), "
        "number, CAST(:new AS TEXT) || substr(workflow_id, CAST(:behind AS INTEGER)), "
        f"{columns} FROM af_artifacts WHERE {where}",
        **as_new,
        **bindings,
    )
