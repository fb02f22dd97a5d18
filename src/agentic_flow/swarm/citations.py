"""Claims and their citations: parsed from an agent's words, checked against the file, ranked.

An agent ends each claim with citations in brackets, `[path:START-END]`. The reviewer's first duty is
mechanical and needs no model: the file exists inside the run's folders, it has those lines, and they speak
of what the claim speaks of. What fails is dropped and counted, never shown as evidence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from agentic_flow.core.errors import AgenticFlowError
from agentic_flow.swarm.runs import Citation

QUOTE_LINES_MAX = 40
_BRACKET = re.compile(r"\[([^\[\]\n]+?):(\d{1,7})(?:\s*[-–]\s*(\d{1,7}))?\]")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|_")
_STOP_WORDS = """
    the and for that this with from are was were not but all any can has have had its one two use used using
    when which what who how why where will would should could may might must then than into onto out over
    under they them their there here also only each other such some more most very does did done been being
    file files line lines code see
"""
_STOP = frozenset(_STOP_WORDS.split())

ReadLines = Callable[[str], Sequence[str]]
"""Path as cited → the lines of that file; raises AgenticFlowError when it cannot be read."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement with what supports it. `number` counts from 1 within one review."""

    number: int
    text: str
    citations: tuple[Citation, ...]
    author: str = ""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A citation that did not stand, and why."""

    label: str
    reason: str


def parse_claims(text: str, *, author: str = "") -> list[Claim]:
    """Cut an answer into claims: the words since the last citation, and the brackets that close them.

    Quoted lines (indented or fenced) are evidence, not claims, and are left out of the claim's text.
    """
    claims: list[Claim] = []
    words: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if fenced or line.startswith(("    ", "\t")):
            continue
        position = 0
        group: list[Citation] = []
        for match in _BRACKET.finditer(line):
            between = line[position : match.start()].strip(" .,;")
            if between and group:
                claims.append(_claim(len(claims) + 1, words, group, author))
                words, group = [], []
            if between:
                words.append(between)
            start = int(match[2])
            end = int(match[3] or match[2])
            group.append(Citation(path=match[1].strip(), line_start=start, line_end=end, quote=""))
            position = match.end()
        if group:
            claims.append(_claim(len(claims) + 1, words, group, author))
            words = []
        rest = line[position:].strip(" .,;")
        if rest:
            words.append(rest)
        elif not line.strip():
            words = []
    return claims


def _claim(number: int, words: list[str], group: list[Citation], author: str) -> Claim:
    return Claim(number, " ".join(words).strip(), tuple(group), author)


def verify(claims: Iterable[Claim], read_lines: ReadLines) -> tuple[list[Claim], list[Rejected]]:
    """Check every citation against its file and fill in the quotes.

    Returns:
        The claims that keep at least one citation, renumbered from 1, and the citations that fell.
    """
    kept: list[Claim] = []
    fallen: list[Rejected] = []
    for claim in claims:
        standing: list[Citation] = []
        for citation in claim.citations:
            checked = _check(claim.text, citation, read_lines)
            if isinstance(checked, Rejected):
                fallen.append(checked)
            else:
                standing.append(checked)
        if standing:
            kept.append(replace(claim, number=len(kept) + 1, citations=tuple(standing)))
    return kept, fallen


def _check(claim: str, citation: Citation, read_lines: ReadLines) -> Citation | Rejected:
    label = citation.label
    if citation.line_start < 1 or citation.line_end < citation.line_start:
        return Rejected(label, "its line range is empty")
    try:
        lines = read_lines(citation.path)
    except AgenticFlowError as error:
        return Rejected(label, error.message)
    if citation.line_end > len(lines):
        return Rejected(label, f"the file has {len(lines)} lines")
    cited = lines[citation.line_start - 1 : citation.line_end]
    quote = "\n".join(cited)
    if not quote.strip():
        return Rejected(label, "those lines are blank")
    if not supports(claim, quote, citation.path):
        return Rejected(label, "those lines do not speak of the claim")
    shown = "\n".join(cited[:QUOTE_LINES_MAX])
    return citation.model_copy(update={"quote": shown})


def supports(claim: str, quote: str, path: str = "") -> bool:
    """Whether the cited lines can be about the claim at all: they share a content word.

    A necessary condition that a machine can check, not a proof; the reviewing model judges the rest. A
    claim without content words (a bare list of citations) passes, since it claims nothing else.
    """
    words = content_words(claim)
    return not words or bool(words & (content_words(quote) | content_words(path)))


def content_words(text: str) -> set[str]:
    """Lower-cased words of three letters or more, identifiers split, stop words and plural s removed."""
    found: set[str] = set()
    for token in _WORD.findall(text):
        for part in _CAMEL.split(token):
            word = part.lower()
            if len(word) >= 3 and word not in _STOP:
                found.add(word[:-1] if word.endswith("s") and len(word) > 3 else word)
    return found


def rank(claims: Iterable[Claim], *, limit: int) -> list[Citation]:
    """Distinct citations in the order of the claims, those that overlap merged into the first of them."""
    ranked: list[Citation] = []
    for claim in claims:
        for citation in claim.citations:
            if not any(_overlap(citation, other) for other in ranked):
                ranked.append(citation)
    return ranked[:limit]


def _overlap(a: Citation, b: Citation) -> bool:
    return a.path == b.path and a.line_start <= b.line_end and b.line_start <= a.line_end
