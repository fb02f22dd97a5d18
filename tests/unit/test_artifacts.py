"""Names, media types and limits of artifacts, and who may replace what; no store."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import (
    AgenticFlowError,
    Conflict,
    Forbidden,
    InvalidInput,
    LimitExceeded,
    TooLarge,
)
from agentic_flow.core.ports import ArtifactRecord, NewArtifact, RunEngine, StepContext
from agentic_flow.core.settings import SwarmSettings
from agentic_flow.swarm.artifact_files import write_out
from agentic_flow.swarm.artifacts import Left, Staged, StepArtifacts, check_name, media_type_of

WRONG = (
    "", "/etc/passwd", "..", "../x", "a/../b", "a/./b", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb",
    " a", "a ", "a/ b", "x" * 201, "é" * 128, "\ud800", "a\u202eb", "C:\\x",
)  # fmt: skip


class Shelf:
    """What a run has stored, in memory; the one method of a RunEngine that is needed."""

    def __init__(self) -> None:
        self.records: list[ArtifactRecord] = []

    async def artifacts(self, workflow_id: str) -> list[ArtifactRecord]:
        await asyncio.sleep(0)
        return list(self.records)

    def store(self, step: StepContext) -> None:
        """Record a step with what it leaves."""
        by, _, index = step.idempotency_key.rpartition(":")
        for one in step.artifacts:
            number = len(self.records) + 1
            version = 1 + sum(record.name == one.name for record in self.records)
            digest = hashlib.sha256(one.content).hexdigest()
            of = (by, int(index), "s", number, one.name, version)
            self.records.append(ArtifactRecord(*of, one.media_type, len(one.content), digest, 1.0))


class Case:
    """One run in one process."""

    def __init__(self, **limits: int) -> None:
        self.shelf = Shelf()
        self.staged = Staged()
        self.settings = SwarmSettings.model_validate(limits)
        self._index = 0

    def step(self, agent: str = "worker-1") -> tuple[StepContext, StepArtifacts]:
        self._index += 1
        step = StepContext(f"run.{agent}:{self._index}")
        return step, StepArtifacts(cast(RunEngine, self.shelf), self.settings, step, self.staged)

    async def leave(self, name: str, text: str, agent: str = "worker-1", **more: Any) -> Left:
        """A step that leaves one text, and is recorded."""
        step, artifacts = self.step(agent)
        left = await artifacts.leave(NewArtifact(name, "text/plain", text.encode()), **more)
        self.shelf.store(step)
        return left


@pytest.mark.parametrize("name", WRONG)
def test_a_name_that_is_no_safe_path_is_refused(name: str) -> None:
    """Catches names that climb, are absolute, mean another file elsewhere, or hide what they are."""
    with pytest.raises(InvalidInput) as refused:
        check_name(name)
    assert refused.value.hint


@given(st.text(max_size=220))
def test_what_is_taken_stays_below_its_folder(name: str) -> None:
    """Catches a name that is taken and leads out of a folder, or that another spelling has as well."""
    try:
        check_name(name)
    except InvalidInput:
        return
    path = PurePosixPath(name)
    assert str(path) == name
    assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}"
    assert not path.is_absolute()


def test_media_types_are_the_same_on_every_machine() -> None:
    """Catches types that depend on the machine's list, and one that would break out of its header."""
    assert media_type_of("a/report.md", None, text=True) == "text/markdown"
    assert media_type_of("a.png", None, text=False) == "image/png"
    assert media_type_of("a.tar.gz", None, text=False) == "application/octet-stream"
    assert media_type_of("notes", None, text=True) == "text/plain"
    assert media_type_of("notes", None, text=False) == "application/octet-stream"
    assert media_type_of("notes", "image/svg+xml", text=True) == "image/svg+xml"
    for wrong in ("text", "text/html; charset=utf-8", "text/html\r\nx: y", "Text/HTML", "", "a/" + "b" * 99):
        with pytest.raises(InvalidInput):
            media_type_of("notes", wrong, text=True)


async def test_versions_and_whose_they_are() -> None:
    """Catches an agent that overwrites another's work unseen, and versions that are counted wrongly."""
    case = Case()
    assert (await case.leave("r.md", "one")).version == 1
    assert (await case.leave("r.md", "two")).version == 2
    same = await case.leave("r.md", "two", "worker-2", expected_version=2)
    assert (same.version, same.is_new) == (2, False)
    for expected in (None, 0, 1, 3):
        with pytest.raises(Conflict) as refused:
            await case.leave("r.md", "theirs", "worker-2", expected_version=expected)
        assert refused.value.hint
    assert (await case.leave("r.md", "theirs", "worker-2", expected_version=2)).version == 3
    assert (await case.leave("r.md", "kept", "collect", replaces_others=True)).version == 4
    assert [record.version for record in case.shelf.records] == [1, 2, 3, 4]
    await case.leave("try.md", "one", "draft.try-1")
    assert (await case.leave("try.md", "two", "draft.try-2")).version == 2, "another attempt is the same step"
    for name in ("r.md/x", "try.md/a/b"):
        with pytest.raises(Conflict):
            await case.leave(name, "x")


async def test_limits_hold_for_steps_at_once_and_for_every_version() -> None:
    """Catches limits that steps under way overshoot together, and ones that a failed step eats into."""
    case = Case(artifact_max_bytes=10, artifacts_max_bytes=25, artifacts_max=4)
    with pytest.raises(TooLarge, match="11 bytes"):
        await case.leave("big", "x" * 11)
    under_way = [case.step(f"worker-{number}") for number in range(5)]

    async def leave(number: int) -> bool:
        _, artifacts = under_way[number]
        try:
            await artifacts.leave(NewArtifact(f"n{number}", "text/plain", b"x" * 8))
        except LimitExceeded as error:
            return "artifacts_max_bytes" not in str(error.hint)
        return True

    left = await asyncio.gather(*map(leave, range(5)))
    assert sorted(left) == [False, False, True, True, True], "24 of 25 bytes"
    stored = left.index(True)
    case.shelf.store(under_way[stored][0])
    with pytest.raises(LimitExceeded):
        await case.leave("more", "x" * 8)
    gone = left.index(True, stored + 1)
    under_way[gone][1].discard()
    assert under_way[gone][0].artifacts == []
    assert (await case.leave("more", "x" * 8)).is_new
    step, artifacts = case.step("cancelled")
    with pytest.raises(LimitExceeded):
        await artifacts.leave(NewArtifact("more2", "text/plain", b"xx"))
    del under_way[left.index(True, gone + 1)], step, artifacts
    gc.collect()
    step, artifacts = case.step("next")
    assert (await artifacts.leave(NewArtifact("more2", "text/plain", b"xx"))).is_new, "a step that is gone"
    case.shelf.store(step)
    await case.leave("small", "")
    with pytest.raises(LimitExceeded, match="4 artifacts"):
        await case.leave("one-more", "")


def test_written_out_whole_and_nowhere_else(tmp_path: Path) -> None:
    """Catches files that are replaced unasked, written in part or through a link, or left over beside."""
    out = tmp_path / "deep" / "out"
    files = [("report.md", b"# One"), ("plots/a.png", bytes(range(256)))]
    assert write_out(out, files) == [out / "report.md", out / "plots" / "a.png"]
    assert (out / "plots" / "a.png").read_bytes() == bytes(range(256))
    with pytest.raises(Conflict, match=r"a\.png"):
        write_out(out, [("new.md", b"x"), ("plots/a.png", b"other")])
    assert not (out / "new.md").exists(), "written although another one was in the way"
    write_out(out, [("plots/a.png", b"other")], force=True)
    assert (out / "plots" / "a.png").read_bytes() == b"other"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret").write_text("secret")
    (out / "link").symlink_to(elsewhere)
    (out / "file-link").symlink_to(elsewhere / "secret")
    wrong: list[tuple[str, bool, type[AgenticFlowError]]] = [
        ("link/x", True, Forbidden),
        ("link/secret", False, Forbidden),
        ("file-link", False, Conflict),
        ("../x", True, InvalidInput),
        ("report.md/x", True, InvalidInput),
    ]
    for name, force, error in wrong:
        with pytest.raises(error):
            write_out(out, [(name, b"changed")], force=force)
    write_out(out, [("file-link", b"mine")], force=True)
    assert not (out / "file-link").is_symlink()
    assert (elsewhere / "secret").read_text() == "secret"
    assert sorted(path.name for path in elsewhere.iterdir()) == ["secret"]
    assert [path.name for path in out.rglob(".*")] == [], "something temporary is left"
