"""From the bytes of a file to text whose lines are what citations count.

Ingestion, the file tools and the reviewer of a run all read through `text_of`, so a line number means the
same everywhere, and the same as in an editor: lines end at LF, CRLF or CR. Other characters that Python's
`splitlines` would end a line at (form feed, U+2028 and so on) become spaces.
"""

from __future__ import annotations

import codecs
import io
import re

from agentic_flow.agentdb.chunking import kind_of
from agentic_flow.core.errors import InvalidInput

_LINE_BREAKS = re.compile(r"\r\n?")
_NOT_LINE_BREAKS = str.maketrans(dict.fromkeys("\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", " "))
_CODING_LINE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark begins it
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_PROBE_BYTES = 8192
_CONTROLS = bytes(set(range(32)) - {9, 10, 12, 13, 27})
_CONTROL_SHARE_MAX = 0.01
_HIDDEN_TAGS = ["script", "style", "template", "noscript", "svg"]
_PDF_PAGES_MAX = 5000


class NotText(InvalidInput):
    """The content is not text, so it has no lines."""


def text_of(path: str, data: bytes) -> str:
    """The text of a file; deterministic.

    Raises:
        NotText: it is binary, or a PDF that cannot be read.
    """
    kind = kind_of(path)
    if kind == "pdf":
        return _normal(_pdf_text(path, data))
    text = _normal(_decoded(path, data))
    return _visible(text) if kind == "html" else text


def _normal(text: str) -> str:
    return _LINE_BREAKS.sub("\n", text).translate(_NOT_LINE_BREAKS)


def _decoded(path: str, data: bytes) -> str:
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    if b"\0" in data[:_PROBE_BYTES]:
        raise _binary(path, data)
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    for line in data.split(b"\n", 2)[:2]:
        declared = _CODING_LINE.match(line)
        if declared:
            try:
                return data.decode(declared[1].decode("ascii"))
            except (LookupError, UnicodeDecodeError):
                break
    probe = data[:_PROBE_BYTES]
    if len(probe) - len(probe.translate(None, _CONTROLS)) > _CONTROL_SHARE_MAX * len(probe):
        raise _binary(path, data)
    return data.decode("latin-1")


def _binary(path: str, data: bytes) -> NotText:
    return NotText(
        f"file {path!r} is binary ({len(data)} bytes)", hint="only text has lines to read and cite"
    )


def _visible(html: str) -> str:
    """The text a reader of the page sees, each piece on the line of the file where it stands.

    Tags are blanked where they stand instead of parsed away, because a parser's text has no line numbers.
    """
    text = html
    for tag in _HIDDEN_TAGS:
        text = re.sub(rf"(?is)<{tag}\b.*?</{tag}\s*>", _only_lines, text)
    text = re.sub(r"(?s)<!--.*?-->", _only_lines, text)
    text = re.sub(r"(?s)</?[a-zA-Z!?][^<>]*>", _only_lines, text)
    from html import unescape

    return "\n".join(unescape(line).strip() for line in text.split("\n"))


def _only_lines(match: re.Match[str]) -> str:
    return " " + "\n" * match[0].count("\n")


def _pdf_text(path: str, data: bytes) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        pages = [page.extract_text() for page in reader.pages[:_PDF_PAGES_MAX]]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        # pypdf lets errors of many kinds through on damaged files.
        raise NotText(f"PDF {path!r} cannot be read: {error}", hint="repair or export it again") from error
    return "\n".join(pages)
