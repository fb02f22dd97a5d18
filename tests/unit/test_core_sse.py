"""Server-sent events: whatever is encoded is parsed again, however the bytes are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.core.errors import TooLarge
from agentic_flow.core.sse import ServerEvent, SseParser, encode, encode_comment

_TEXT = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]), max_size=30)
_NAME = st.text(
    st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), min_size=1, max_size=10
)
_EVENTS = st.lists(
    st.builds(ServerEvent, _TEXT, st.none() | _NAME, _NAME.filter(lambda text: text == text.strip(" "))),
    max_size=6,
)


@given(events=_EVENTS, newline=st.sampled_from([b"\n", b"\r\n", b"\r"]), data=st.data())
def test_events_survive_the_wire_in_any_pieces(
    events: list[ServerEvent], newline: bytes, data: st.DataObject
) -> None:
    """Catches events lost, merged or altered at chunk borders, in every line ending the standard allows."""
    wire = b"".join(encode_comment("beat") + encode(event) for event in events).replace(b"\n", newline)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    parser = SseParser()
    found: list[ServerEvent] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        found += parser.feed(wire[start:end])
    assert found == events
    assert not parser.unfinished


def test_a_cut_stream_is_told_from_a_finished_one() -> None:
    """Catches a truncated answer that looks complete."""
    parser = SseParser()
    assert parser.feed(b"data: 1\n\ndata: 2\n") == [ServerEvent("1")]
    assert parser.unfinished


def test_the_standards_own_oddities() -> None:
    """Catches deviations from WHATWG HTML 9.2: byte order mark, no space, no colon, sticky id."""
    parser = SseParser()
    wire = (
        b"\xef\xbb\xbfdata:a\ndata\ndata:  b\n\n: note\n\nid: 7\n\nevent: x\ndata: c\nretry: 3\nother: y\n\n"
    )
    assert parser.feed(wire) == [ServerEvent("a\n\n b"), ServerEvent("c", "x", "7")]


@pytest.mark.parametrize("wire", [b"data: " + b"x" * 200, b"data: x\n" * 50])
def test_an_endless_event_is_refused(wire: bytes) -> None:
    """Catches memory that grows with what a peer sends."""
    with pytest.raises(TooLarge):
        SseParser(event_max_bytes=100).feed(wire)


@pytest.mark.parametrize("event", [ServerEvent("x", event="a\nb"), ServerEvent("x", id="a\rdata: forged")])
def test_names_cannot_forge_events(event: ServerEvent) -> None:
    """Catches events smuggled in through an id or a type."""
    with pytest.raises(ValueError, match="control character"):
        encode(event)
