"""Chunks cover the file exactly, keep to the limits, and follow its structure."""

from __future__ import annotations

from collections import Counter
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.chunking import Chunk, Kind, chunk, kind_of

PIECES = st.sampled_from(
    ["", "", "def f():", "    return 1", "class A:", "    def m(self):", '        """Doc.', "def not_me():",
     '"""', "@decorated", "# comment", "# Heading", "## Sub", "```", "---", "text text", "x" * 50,
     "  ", ")", "\t", "@open("]
)  # fmt: skip


def chunks_of(text: str, kind: Kind, *, lines_max: int = 60, chars_max: int = 4000) -> list[Chunk]:
    return chunk(dedent(text).strip("\n").split("\n"), kind, lines_max=lines_max, chars_max=chars_max)


@given(
    st.lists(PIECES | st.text(st.characters(exclude_characters="\n"), max_size=30), max_size=60),
    st.sampled_from(["python", "markdown", "text", "json"]),
    st.integers(1, 20),
    st.integers(1, 120),
)
def test_chunks_cover_the_file_exactly(lines: list[str], kind: Kind, lines_max: int, chars_max: int) -> None:
    """Catches a line lost, doubled or renumbered, and a chunk past its limits, in any file."""
    found = chunk(lines, kind, lines_max=lines_max, chars_max=chars_max)
    covered: Counter[int] = Counter()
    long_lines: dict[int, str] = {}
    for one in found:
        assert 1 <= one.line_start <= one.line_end <= len(lines)
        assert one.line_end - one.line_start < lines_max
        assert len(one.text) <= chars_max
        whole = "\n".join(lines[one.line_start - 1 : one.line_end])
        if len(whole) > chars_max:
            assert one.line_start == one.line_end
            long_lines[one.line_start] = long_lines.get(one.line_start, "") + one.text
        else:
            assert one.text == whole
            assert one.part == 0
            covered.update(range(one.line_start, one.line_end + 1))
    for number, text in long_lines.items():
        assert (
            text.strip() == lines[number - 1].strip()
            or " " * chars_max in lines[number - 1] + " " * chars_max
        )
    assert all(count == 1 for count in covered.values())
    missing = set(range(1, len(lines) + 1)) - set(covered) - set(long_lines)
    assert all(not lines[number - 1].strip() for number in missing)
    assert len({(one.line_start, one.line_end, one.part) for one in found}) == len(found)


def test_python_is_cut_by_definitions() -> None:
    """Catches a decorator or comment cut off its function, and a wrong qualified name."""
    body = "\n".join(f"    step_{n}()" for n in range(12))
    method = "\n".join(f"        step_{n}()" for n in range(12))
    text = (
        f'"""Module."""\nimport os\n\n# Says hello.\n@cached\n@traced(\n    "x"\n)\ndef hello():\n{body}\n\n'
        "class Greeter(object):\n    '''A class.\n\n    def not_a_method(self): it says\n    '''\n\n"
        f"    async def greet(self):\n{method}\n\n    class Inner:\n        def deep(self):\n    {method}\n\n"
        f"VALUE = 3\n{chr(10).join(f'T{n} = {n}' for n in range(12))}\n"
    )
    lines = text.split("\n")
    found = {one.symbol: one for one in chunk(lines, "python", lines_max=60, chars_max=4000)}
    assert set(found) == {None, "hello", "Greeter, greet", "Greeter.Inner, deep"}
    assert "\n# Says hello.\n@cached\n@traced(\n" in found["hello"].text
    assert "step_11()" in found["hello"].text
    assert "not_a_method" in found["Greeter, greet"].text
    assert "VALUE = 3" in found[None].text


def test_decorators_and_comments_stay_with_their_function() -> None:
    """Catches a chunk that begins at `def` and leaves what explains it behind."""
    padding = "\n".join(f"    line_{n} = {n}" for n in range(10))
    second = f"# Why second is needed.\n@decorated\ndef second():\n{padding}"
    text = f"import os\n\n\ndef first():\n{padding}\n\n\n{second}"
    assert [one.text for one in chunks_of(text, "python") if one.symbol == "second"] == [second]


def test_small_neighbours_share_a_chunk() -> None:
    """Catches one-line methods that become chunks too small to mean anything."""
    text = "class Point:\n" + "\n".join(f"    def m{n}(self): return {n}\n" for n in range(6))
    found = chunks_of(text, "python")
    assert len(found) < 4
    assert any(one.symbol and "m1" in one.symbol and "m2" in one.symbol for one in found)


def test_markdown_is_cut_by_headings() -> None:
    """Catches a heading inside a fence taken for one, and a lost heading path."""
    filler = "\n\n".join(f"Paragraph {n} of this section, with words." for n in range(6))
    text = (
        f"Intro\n\n{filler}\n\n# Guide\n\n{filler}\n\n## Setup\n\n```sh\n# not a heading\n```\n\n{filler}\n\n"
        f"Other\n=====\n\n{filler}\n"
    )
    found = chunks_of(text, "markdown")
    assert [one.symbol for one in found] == [None, "Guide", "Guide > Setup", "Other"]
    assert "# not a heading" in found[2].text
    assert found[3].text.startswith("Other\n=====")


def test_long_sections_are_cut_between_paragraphs() -> None:
    """Catches cuts in the middle of a paragraph where a blank line was near."""
    text = "\n\n".join("\n".join(f"line {n} of paragraph {p}" for n in range(7)) for p in range(6))
    for one in chunks_of(text, "text", lines_max=20):
        assert one.text.startswith("line 0 of")
        assert one.text.splitlines()[-1].startswith("line 6 of")


def test_an_overlong_line_keeps_all_its_text() -> None:
    """Catches minified files of which only the beginning can be found."""
    line = "".join(f"word{n} " for n in range(500))
    found = chunk(["short", line, "short"], "json", lines_max=60, chars_max=300)
    pieces = [one for one in found if one.line_start == 2]
    assert "".join(one.text for one in pieces) == line
    assert [one.part for one in pieces] == list(range(len(pieces)))


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.py", "python"),
        ("README.MD", "markdown"),
        ("x.PDF", "pdf"),
        ("Makefile", "text"),
        ("m.c", "code"),
    ],
)
def test_kind_by_name(path: str, kind: str) -> None:
    """Catches a kind that depends on the case of a name, or a file without ending that is refused."""
    assert kind_of(path) == kind
