"""Files as text whose line numbers are true: what ingestion, file tools and reviews all read through.

Lines are what an editor counts: separated by LF, CRLF or CR and nothing else. The rarer characters at which
`str.splitlines` also cuts (form feed, NEL, U+2028, …) are shown as spaces, so that it cuts where editors do.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
from dataclasses import dataclass
from html import unescape
from typing import Literal

from agentic_flow.agentdb.chunking import kind_of
from agentic_flow.core.errors import InvalidInput, TooLarge

PROBE_BYTES = 8192
PDF_PAGES_MAX = 5000
TEXT_CHARS_MAX = 64 * 1024 * 1024

_ODD_BREAKS = re.compile("[\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")
_CODING = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.ASCII)
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x7f]")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LATIN_HIGH_SHARE_MAX = 0.3
_ASCII = bytes(range(128))

_INLINE = frozenset(
    """
    a abbr b bdi bdo cite code data del dfn em font i ins kbd mark q s samp small span strong sub sup time tt
    u var wbr
    """.split()
)


class BinaryContent(InvalidInput):
    """The content of a file is no text."""


@dataclass(frozen=True, slots=True)
class FileText:
    """The text of a file. `page_starts` are the 0-based lines at which PDF pages begin."""

    text: str
    page_starts: tuple[int, ...] = ()


def text_of(path: str, data: bytes) -> str:
    """The text of a file's content, for line numbers that agree everywhere.

    Source code and plain text as they are; of HTML what a reader sees, on the lines where it stands; of PDF
    the extracted text.

    Raises:
        BinaryContent: the content is no text.
        InvalidInput: a PDF cannot be read.
        TooLarge: the extracted text is past 64 Mi characters.
    """
    return read_text(path, data).text


def read_text(path: str, data: bytes) -> FileText:
    """`text_of`, with the pages of a PDF."""
    kind = kind_of(path)
    if kind == "pdf" and data.lstrip()[:5] == b"%PDF-":
        return _pdf_text(path, data)
    text = _plain_lines(decode(path, data))
    return FileText(_html_text(text) if kind == "html" else text)


def looks_binary(path: str, head: bytes) -> bool:
    """Whether the beginning of a file shows already that it is no text: a NUL, as git has it."""
    return b"\0" in head and kind_of(path) != "pdf" and not any(head.startswith(bom) for bom, _ in _BOMS)


def decode(path: str, data: bytes) -> str:
    """Bytes as text: a byte-order mark decides, then UTF-8, a PEP 263 line, and Latin-1 if it looks so.

    Raises:
        BinaryContent: none of these gives text.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            try:
                return data[len(bom) :].decode(encoding)
            except UnicodeDecodeError:
                break
    if b"\0" not in data:
        try:
            return data.decode()
        except UnicodeDecodeError:
            declared = _declared(data)
            if declared is not None:
                return declared
            text = data.decode("latin-1")
            high = len(data.translate(None, _ASCII))
            if not _CONTROL.search(text) and high <= _LATIN_HIGH_SHARE_MAX * len(data):
                return text
    raise BinaryContent(
        f"file {path!r} is binary ({len(data)} bytes)", hint="only text, HTML and PDF can be read as text"
    )


def _declared(data: bytes) -> str | None:
    """The text by the encoding that a comment in the first two lines names, if it can be."""
    for line in data.split(b"\n", 2)[:2]:
        match = _CODING.match(line)
        if match:
            try:
                text = data.decode(codecs.lookup(match[1].decode("ascii")).name)
                return text.encode("utf-8", "replace").decode()  # some codecs give lone surrogates
            except (LookupError, UnicodeError, TypeError):
                return None  # an unknown codec, or one that is not for text
    return None


def _plain_lines(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _ODD_BREAKS.sub(" ", text)


# HTML


_MARKUP = re.compile(
    r"<(?:(?P<unseen>script|style|template|noscript|svg)\b|(?P<comment>!--)|/?(?P<name>[a-z][a-z0-9]*)|[!?])",
    re.IGNORECASE,
)
_TAG_REST = re.compile(r"[^<>]*>")
_REFERENCE = re.compile(r"&(?:#\w{1,10}|\w{1,40});")


def _html_text(text: str) -> str:
    """What a reader of the page sees, every piece on the line of the file where it stands.

    Markup is blanked where it stands; a parser's tree would have no line numbers. One pass, linear in the
    text whatever is in it: a closing mark that was once not found is not looked for again.
    """
    pieces: list[str] = []
    missing: set[str] = set()
    position = 0
    while (found := _MARKUP.search(text, position)) is not None:
        pieces.append(text[position : found.start()])
        end = _end_of_unseen(text, found, missing)
        if end is None:
            rest = _TAG_REST.match(text, found.start() + 1)
            if rest is None:  # a lone "<"
                pieces.append("<")
                position = found.start() + 1
                continue
            end = rest.end()
        inline = (found["name"] or "").lower() in _INLINE
        pieces.append(("" if inline else " ") + "\n" * text.count("\n", found.start(), end))
        position = end
    pieces.append(text[position:])
    visible = _REFERENCE.sub(_referred, "".join(pieces))
    return "\n".join(" ".join(line.split()) for line in visible.split("\n"))


def _end_of_unseen(text: str, found: re.Match[str], missing: set[str]) -> int | None:
    """Where a comment, or an element that is not shown, ends; None for everything else."""
    kind = "comment" if found["comment"] else (found["unseen"] or "").lower()
    if not kind or kind in missing:
        return None
    closing = "-->" if kind == "comment" else rf"</{kind}\s*>"
    end = re.compile(closing, re.IGNORECASE).search(text, found.end())
    if end is None:
        missing.add(kind)
        return None
    return end.end()


def _referred(reference: re.Match[str]) -> str:
    # What a reference stands for may be a line break, but it stands on this line.
    return _ODD_BREAKS.sub(" ", unescape(reference[0])).replace("\n", " ").replace("\r", " ")


# PDF


def _pdf_text(path: str, data: bytes) -> FileText:
    import pypdf
    from pypdf.errors import PyPdfError

    # What is odd about a PDF is for its author; whether it could be read is said by the result.
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    lines: list[str] = []
    starts: list[int] = []
    size = 0
    try:
        pages = pypdf.PdfReader(io.BytesIO(data)).pages
        if len(pages) > PDF_PAGES_MAX:
            raise TooLarge(f"file {path!r} has {len(pages)!r} pages", hint=f"at most {PDF_PAGES_MAX}")
        for page in pages:
            starts.append(len(lines))
            found = _plain_lines(page.extract_text()).split("\n")
            size += sum(map(len, found))
            if size > TEXT_CHARS_MAX:
                raise TooLarge(
                    f"the text of {path!r} is too long", hint=f"at most {TEXT_CHARS_MAX} characters"
                )
            lines += found
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        # Malformed files reach every kind of error inside the library.
        raise InvalidInput(
            f"file {path!r} is a PDF that cannot be read: {error}", hint="open and save it anew, unencrypted"
        ) from error
    # A surrogate half, as broken fonts yield them, cannot be stored.
    text = "\n".join(lines).encode("utf-8", "replace").decode()
    return FileText(text, tuple(starts))


SkipReason = Literal["binary", "ignored", "too_large", "unreadable", "empty"]
