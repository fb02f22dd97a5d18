"""Cutting a text into chunks that follow its structure. Pure functions; every line belongs to one chunk.

Python is cut by definitions, Markdown by headings, everything else by paragraphs. Sections are then packed:
small neighbours of one parent share a chunk, and what exceeds the limits is cut where it hurts least.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["python", "markdown", "html", "pdf", "json", "csv", "code", "text"]

_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".py", ".pyi", ".pyw"), "python"),
    **dict.fromkeys((".md", ".markdown", ".mdx"), "markdown"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys(
        (
            ".c .h .cc .cpp .cxx .hpp .hh .cs .go .rs .java .kt .scala .swift .m .js .mjs .cjs .jsx .ts .tsx "
            ".vue .rb .php .pl .pm .lua .r .jl .ex .exs .erl .hs .ml .clj .dart .zig .sh .bash .zsh .fish "
            ".ps1 .bat .sql .proto .tf .gradle .cmake .css .scss .less"
        ).split(),
        "code",
    ),
}

SMALL_LINES = 8
"""Sections up to this size share a chunk with their neighbours."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines `line_start` to `line_end` (1-based, inclusive) and what they are about.

    `symbol` is a qualified name or a heading path. `part` counts the pieces of one overlong line from 0.
    """

    line_start: int
    line_end: int
    text: str
    symbol: str | None = None
    part: int = 0


@dataclass(frozen=True, slots=True)
class _Section:
    """Lines start..stop (0-based, half open); `parent` names what it may be merged within."""

    start: int
    stop: int
    symbol: str | None
    parent: str | None


def kind_of(path: str) -> Kind:
    """The kind of a file by its name's ending; what is not known is text."""
    return _KINDS.get(PurePosixPath(path).suffix.lower(), "text")


def chunk(lines: Sequence[str], kind: Kind, *, lines_max: int, chars_max: int) -> list[Chunk]:
    """Cut a file's lines into chunks.

    Args:
        lines: The lines without their ends.
        kind: How to find structure.
        lines_max: Most lines of one chunk.
        chars_max: Most characters of one chunk; a longer line is cut into several chunks of that line.
    """
    if kind == "python":
        sections = _python_sections(lines)
    elif kind == "markdown":
        sections = _markdown_sections(lines)
    else:
        sections = [_Section(0, len(lines), None, None)]
    found: list[Chunk] = []
    for section in _packed(sections, lines, min(SMALL_LINES, lines_max), chars_max):
        for start, stop in _pieces(lines, section.start, section.stop, lines_max, chars_max):
            found += _chunks_of(lines, start, stop, section.symbol, chars_max)
    return found


def _chunks_of(
    lines: Sequence[str], start: int, stop: int, symbol: str | None, chars_max: int
) -> Iterator[Chunk]:
    while start < stop and not lines[start].strip():
        start += 1
    while stop > start and not lines[stop - 1].strip():
        stop -= 1
    if start == stop:
        return
    text = "\n".join(lines[start:stop])
    if len(text) <= chars_max:
        yield Chunk(start + 1, stop, text, symbol)
        return
    # Only a single line can be that long here.
    for part, offset in enumerate(range(0, len(text), chars_max)):
        piece = text[offset : offset + chars_max]
        if piece.strip():
            yield Chunk(start + 1, stop, piece, symbol, part)


# Packing and cutting


def _packed(
    sections: Sequence[_Section], lines: Sequence[str], small_lines: int, chars_max: int
) -> Iterator[_Section]:
    """Join small neighbours that have the same parent, until together they are no longer small."""
    held: _Section | None = None
    for section in sections:
        if held is None:
            held = section
            continue
        together = section.stop - held.start
        small = (held.stop - held.start) <= small_lines or (section.stop - section.start) <= small_lines
        if (
            small
            and held.parent == section.parent
            and together <= 3 * small_lines
            and sum(map(len, lines[held.start : section.stop])) + together <= chars_max
        ):
            held = _Section(held.start, section.stop, _joined(held.symbol, section.symbol), held.parent)
        else:
            yield held
            held = section
    if held is not None:
        yield held


def _joined(first: str | None, second: str | None) -> str | None:
    """`A.f` and `A.g` → `A.f, g`; a scope that continues is named once."""
    if first is None or second is None:
        return first or second
    name = second.rpartition(".")[2]
    known = {part.rpartition(".")[2] for part in first.split(", ")}
    return first if name in known else f"{first}, {name}"


def _pieces(
    lines: Sequence[str], start: int, stop: int, lines_max: int, chars_max: int
) -> Iterator[tuple[int, int]]:
    """Cut start..stop into ranges within the limits: best at blank lines and at the margin."""
    while start < stop:
        end, size = start, 0
        while end < stop and end - start < lines_max:
            size += len(lines[end]) + 1
            if size > chars_max + 1 and end > start:
                break
            end += 1
        if end < stop:
            end = _best_cut(lines, start, end)
        yield start, end
        start = end


def _best_cut(lines: Sequence[str], start: int, end: int) -> int:
    """Where to cut at or before `end`, in the last two thirds of start..end."""
    best, best_cost = end, _cut_cost(lines, end) if end < len(lines) else 0.0
    for position in range(end - 1, start + (end - start) // 3, -1):
        cost = _cut_cost(lines, position) + 0.05 * (end - position)
        if cost < best_cost:
            best, best_cost = position, cost
    return best


def _cut_cost(lines: Sequence[str], position: int) -> float:
    """How much it hurts to begin a chunk at this line: little after a blank line and at the margin."""
    line = lines[position]
    if not line.strip():
        return 8.0
    indent = len(line) - len(line.lstrip())
    return min(indent, 24) / 4 + (0.0 if not lines[position - 1].strip() else 3.0)


# Python

_DEFINITION = re.compile(r"([ \t]*)(?:async[ \t]+def|def|class)[ \t]+(\w+)")
_STRING_OR_COMMENT = re.compile(
    r"#[^\n]*"
    r'|"""(?:[^\\]|\\.)*?(?:"""|\Z)'
    r"|'''(?:[^\\]|\\.)*?(?:'''|\Z)"
    r'|"(?:[^"\\\n]|\\.)*"?'
    r"|'(?:[^'\\\n]|\\.)*'?",
    re.DOTALL,
)


def _lines_in_strings(lines: Sequence[str]) -> set[int]:
    """Lines (0-based) that begin inside a string literal; a definition there is only text."""
    inside: set[int] = set()
    text = "\n".join(lines)
    if '"""' not in text and "'''" not in text and "\\\n" not in text:
        return inside
    number, counted = 0, 0
    for match in _STRING_OR_COMMENT.finditer(text):
        breaks = text.count("\n", match.start(), match.end())
        if breaks:
            number += text.count("\n", counted, match.start())
            inside.update(range(number + 1, number + breaks + 1))
            number += breaks
            counted = match.end()
    return inside


def _python_sections(lines: Sequence[str]) -> list[_Section]:
    """One section per function, method and class head; what lies between belongs to the enclosing scope."""
    in_string = _lines_in_strings(lines)
    marks: list[tuple[int, str | None, str | None]] = [(0, None, None)]
    scopes: list[tuple[int, str, bool]] = []  # indentation, qualified name, whether it is a class
    lead = 0  # first of the comments and decorators directly above
    unclosed = 0  # brackets that a decorator left open
    for number, line in enumerate(lines):
        stripped = line.strip()
        if unclosed > 0:
            unclosed += _opened(stripped)
            continue
        if number in in_string or not stripped or stripped[0] in ")]}":
            lead = number + 1
            continue
        if stripped[0] == "@":
            unclosed = _opened(stripped)
            continue
        if stripped[0] == "#":
            continue
        indent = len(line) - len(line.lstrip())
        match = _DEFINITION.match(line)
        left = False
        while scopes and indent <= scopes[-1][0]:
            scopes.pop()
            left = True
        inside_function = any(not is_class for _, _, is_class in scopes)
        if match is None:
            if left and not inside_function:
                scope = scopes[-1][1] if scopes else None
                marks.append((lead, scope, scope))
            lead = number + 1
            continue
        parent = scopes[-1][1] if scopes else None
        name = f"{parent}.{match[2]}" if parent else match[2]
        is_class = stripped.startswith("class")
        scopes.append((indent, name, is_class))
        if not inside_function:
            # A class head holds its docstring and attributes; it is not merged into what precedes it.
            marks.append((min(lead, number), name, name if is_class else parent))
        lead = number + 1
    return _from_marks(marks, len(lines))


def _opened(line: str) -> int:
    """How many more brackets a line opens than it closes."""
    return sum(line.count(mark) for mark in "([{") - sum(line.count(mark) for mark in ")]}")


def _from_marks(marks: Sequence[tuple[int, str | None, str | None]], total: int) -> list[_Section]:
    stops = [mark[0] for mark in marks[1:]] + [total]
    return [
        _Section(start, stop, symbol, parent)
        for (start, symbol, parent), stop in zip(marks, stops, strict=True)
        if stop > start
    ]


# Markdown

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")


def _markdown_sections(lines: Sequence[str]) -> list[_Section]:
    """One section per heading (ATX or setext, CommonMark), named by the path of headings above it."""
    marks: list[tuple[int, str | None, str | None]] = [(0, None, None)]
    headings: list[tuple[int, str]] = []
    fence: str | None = None
    for number, line in enumerate(lines):
        opened = _FENCE.match(line)
        if opened and (fence is None or line.strip().startswith(fence)):
            fence = opened[1] if fence is None else None
            continue
        if fence is not None:
            continue
        start, level, title = number, 0, ""
        if match := _HEADING.match(line):
            level, title = len(match[1]), match[2]
        elif (
            (match := _UNDERLINE.match(line))
            and number > 0
            and lines[number - 1].strip()
            and not _HEADING.match(lines[number - 1])
            and (number == 1 or not lines[number - 2].strip())
        ):
            start, level, title = number - 1, 1 if match[1][0] == "=" else 2, lines[number - 1].strip()
        if not level:
            continue
        while headings and headings[-1][0] >= level:
            headings.pop()
        parent = " > ".join(name for _, name in headings) or None
        headings.append((level, title))
        marks.append((start, " > ".join(name for _, name in headings), parent))
    return _from_marks(marks, len(lines))
