"""Paths that models may send: spelling, confinement and patterns, with nasty paths generated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError, InvalidInput
from agentic_flow.core.ports import ToolScope
from agentic_flow.core.toolkit import PathRules
from agentic_flow.tools.confine import canonical_path, confined_read
from agentic_flow.tools.text import lines_of, page_of_lines, plain_text

LOOT = b"LOOT"
component = st.sampled_from(
    ["..", ".", "", "a", "b", "file", "up", "abs", "loop", "dirlink", "...", ".. ", " ..", "..\\", "~",
     "%2e%2e", "\uff0e\uff0e", "A", "\0", "\ud800", "\n", "loot", "outside", "x" * 300]
)  # fmt: skip
nasty_paths = st.one_of(
    st.lists(component, max_size=8).map("/".join),
    st.lists(component, max_size=8).map(lambda parts: "/" + "/".join(parts)),
    st.text(max_size=30),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """root/ with real files and every kind of link out of it; outside/ with what must not be read."""
    base = tmp_path_factory.mktemp("confine")
    outside = base / "outside"
    outside.mkdir()
    (outside / "loot").write_bytes(LOOT)
    (outside / "file").write_bytes(LOOT)
    root = base / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "file").write_bytes(b"fine")
    (root / "a" / "file").write_bytes(b"fine")
    (root / "a" / "b" / "loot").write_bytes(b"fine")
    for place in (root, root / "a"):
        (place / "up").symlink_to("../" * (2 if place != root else 1) + "outside")
        (place / "abs").symlink_to(outside)
        (place / "loop").symlink_to("loop")
        (place / "dirlink").symlink_to(root / "a")
        (place / "loot").symlink_to(outside / "loot")
    return root


@given(nasty_paths)
@example("up/loot")
@example("a/../../outside/loot")
@example("a/up/file")
@example("dirlink/../outside/loot")
def test_no_path_reads_outside_the_root(folder: Path, path: str) -> None:
    """Catches any spelling that gets out: a read returns a file inside the root or an error of ours."""
    try:
        data = confined_read(ToolScope(roots={"r": folder}), path, max_bytes=100)
    except AgenticFlowError:
        return
    assert data == b"fine"
    real = os.path.realpath(folder / canonical_path(path))
    assert real.startswith(f"{folder}/")
    assert not any(
        part.is_symlink() for part in (folder / canonical_path(path)).parents if part != folder.parent
    )


@given(nasty_paths)
def test_canonical_is_one_spelling(path: str) -> None:
    """Catches two spellings of one file, with which a rule on the one is passed by the other."""
    try:
        clean = canonical_path(path)
    except InvalidInput:
        return
    assert canonical_path(clean) == clean
    assert canonical_path(f"./{path}//.") == clean
    assert not {"", ".", ".."} & set(clean.split("/")) or clean == ""
    assert "\0" not in clean
    clean.encode()


plain = st.lists(st.sampled_from(["secret", "docs", "a.key", "x", "r", "s"]), min_size=1, max_size=4)


@given(plain)
def test_forbidden_folders_cover_all_below(parts: list[str]) -> None:
    """Catches a pattern that forbids a folder but not its contents, or an allow-list that wins over it."""
    path = "/".join(parts)
    rules = PathRules(
        ToolScope(roots={"r": Path("/r")}, paths_allowed=("**",), paths_forbidden=("secret/", "*.key"))
    )
    inside = "secret" in parts[:-1] or "a.key" in parts
    assert rules.allows(path) is not inside
    assert rules.forbids(path) is inside


@given(plain, st.sampled_from(["r", "s"]))
def test_rooted_patterns_with_several_roots(parts: list[str], root: str) -> None:
    """Catches a pattern for one root that opens another, and a bare pattern that misses a root."""
    scope = ToolScope(
        roots={"r": Path("/r"), "s": Path("/s")}, paths_allowed=("/r/docs/**",), paths_forbidden=("x",)
    )
    path = "/".join([root, *parts])
    allowed = root == "r" and parts[0] == "docs" and len(parts) > 1 and "x" not in parts
    assert PathRules(scope).allows(path) is allowed


def test_malformed_patterns_are_named() -> None:
    """Catches a broken pattern that silently allows everything."""
    with pytest.raises(InvalidInput, match="pattern"):
        PathRules(ToolScope(paths_forbidden=("!",)))


@given(st.text(max_size=200), st.integers(1, 12), st.integers(40, 400), st.booleans())
def test_pages_of_lines_are_whole_and_bounded(text: str, start: int, max_bytes: int, numbered: bool) -> None:
    """Catches lines lost between pages and pages past their size."""
    import orjson

    lines = lines_of(text)
    if start > max(len(lines), 1):
        with pytest.raises(InvalidInput):
            page_of_lines(lines, start, None, max_bytes=max_bytes)
        return
    page = page_of_lines(lines, start, None, max_bytes=max_bytes, numbered=numbered)
    assert len(orjson.dumps(page.text)) <= max_bytes + 2
    shown = lines[start - 1 : page.line_end]
    if not numbered and not (page.truncated and page.line_end == start):
        assert page.text == "\n".join(shown)
    assert page.truncated or page.line_end == max(len(lines), start - 1)
    assert page.line_end >= start or not lines[start - 1 :]


@given(st.binary(max_size=100))
def test_text_or_refusal(data: bytes) -> None:
    """Catches bytes that crash decoding or slip through as text that JSON cannot hold."""
    try:
        plain_text("f", data).encode()
    except InvalidInput:
        assert b"\0" in data
