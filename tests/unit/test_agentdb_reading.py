"""Files become text whose line numbers are those an editor shows."""

from __future__ import annotations

import codecs
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.reading import read_text, text_of
from agentic_flow.core.errors import InvalidInput


def test_encodings() -> None:
    """Catches text that is refused or misread because it is not UTF-8."""
    word = "Größe der Straße"
    assert text_of("a.txt", word.encode()) == word
    assert text_of("a.txt", codecs.BOM_UTF8 + word.encode()) == word
    assert text_of("a.txt", word.encode("utf-16")) == word
    assert text_of("a.txt", word.encode("utf-32")) == word
    assert text_of("a.txt", word.encode("latin-1")) == word
    assert text_of(
        "a.py", b"#!/usr/bin/python\n# -*- coding: koi8-r -*-\n" + "привет".encode("koi8-r")
    ).endswith("привет")


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF\x00\x01",
        bytes(range(1, 256)),
        b"# coding: no-such-codec\n\xff\x01",
        b"# coding: base64\n\xff\x01",
        "日本語の長い文章です".encode("euc-jp") * 3,
        b"text and later a \x00 byte",
    ],
)
def test_what_is_no_text_is_refused(data: bytes) -> None:
    """Catches garbage that would be searched and cited as if it were text."""
    with pytest.raises(InvalidInput) as caught:
        text_of("a.bin", data)
    assert caught.value.hint


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=8)))
def test_lines_are_what_editors_count(lines: list[str]) -> None:
    """Catches `splitlines` cutting at form feeds and other characters that no editor takes for a line end."""
    for end in ("\n", "\r\n", "\r"):
        data = "".join(line + end for line in lines).encode()
        if data.startswith(codecs.BOM_UTF8):
            continue
        got = text_of("a.txt", data).splitlines()
        assert len(got) == len(lines)
        assert all(len(a) == len(b) for a, b in zip(got, lines, strict=True))


HTML = """<!DOCTYPE html>
<html><head><title>A title</title>
<style>p { color: red }
</style><script>
var hidden = "</b>";
</script></head>
<body class="x
  y"><!-- a
comment --><p>First &amp; <b>bold</b>ly<br>next</p>
<table><tr><td>cell&nbsp;one</td><td
>two</td></tr>
<tr><td>three &#169; &lt;tag&gt;</td></table>
<pre>kept
  lines</pre>
"""


def test_html_keeps_line_numbers() -> None:
    """Catches visible text that moves to another line of the file, or markup that shows."""
    lines = text_of("page.html", HTML.encode()).splitlines()
    assert len(lines) == len(HTML.splitlines())
    shown = {number: line for number, line in enumerate(lines, start=1) if line}
    assert shown == {
        2: "A title",
        9: "First & boldly next",
        10: "cell one",
        11: "two",
        12: "three © <tag>",
        13: "kept",
        14: "lines",
    }


@given(
    st.lists(
        st.sampled_from(["<p>", "</p>", "\n", "text", "<!--", "-->", "<a href='x\n'>", "&amp;", "&", "<", ">",
                         "<script>", "</script>", "<table>", "\"", "]]>", "<![CDATA[", "<?", "</", "&#10;"]),
        max_size=20,
    )
)  # fmt: skip
def test_broken_html_keeps_line_numbers(pieces: list[str]) -> None:
    """Catches malformed markup that shifts lines or raises."""
    source = "".join(pieces)
    assert text_of("page.htm", source.encode()).count("\n") == source.count("\n")


def pdf(*pages: str) -> bytes:
    """A PDF with one line of Helvetica per line of each page, written by hand."""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    kids: list[str] = []
    for page in pages:
        shown = "\n".join(f"({line}) Tj T*" for line in page.split("\n"))
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td\n{shown}\nET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 3 0 R >> >> >>" % len(objects)
        )
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>".encode()
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    offsets: list[int] = []
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.writelines(b"%010d 00000 n \n" % offset for offset in offsets)
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
    return out.getvalue()


def test_pdf_text_and_pages() -> None:
    """Catches a PDF whose text is not found, or whose pages begin at other lines."""
    found = read_text("a.pdf", pdf("Hello first\nsecond line", "On page two"))
    lines = found.text.splitlines()
    assert lines[0].strip() == "Hello first"
    assert "second line" in lines[1]
    assert lines[found.page_starts[1]].strip() == "On page two"


def test_broken_pdf_is_refused() -> None:
    """Catches a damaged or encrypted PDF that brings the whole ingestion down."""
    good = pdf("Hello")
    for data in (good[:40], b"%PDF-1.7\n" + b"\x00" * 100, good.replace(b"/Pages", b"/Pigs")):
        with pytest.raises(InvalidInput):
            text_of("a.pdf", data)
