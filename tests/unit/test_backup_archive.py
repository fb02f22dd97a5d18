"""The file of a backup: what is read back, and everything that is no whole backup of ours is told apart."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_flow.core.errors import AgenticFlowError, Conflict, DataCorrupted, InvalidInput, PathNotFound
from agentic_flow.core.version import __version__
from agentic_flow.deploy.archive import (
    ABOUT,
    FORMAT,
    MANIFEST,
    About,
    ArchiveWriter,
    new_archive,
    read_about,
    read_archive,
)
from agentic_flow.deploy.backup import restore_folder

HEAD = About(made_at_s=1.0, at_s=2.0, kind="embedded", store="directory", name="data", with_secrets=False)
FILES = {
    "data/identity.db": b"keys" * 5000,
    "data/runs/runs.db": bytes(range(256)) * 40,
    "data/audit.db": b"",
}
GZIP_HEADER_BYTES = 10
"""The time and system in it are not covered by any checksum, and nobody reads them."""


def make(path: Path, files: dict[str, bytes] | None = None) -> Path:
    """A backup of these files."""
    with new_archive(path) as sink, ArchiveWriter(sink, HEAD) as archive:
        for name, content in (FILES if files is None else files).items():
            archive.add_bytes(name, content)
        archive.finish(0.001)
    return path


@given(
    st.dictionaries(
        st.lists(st.text("abcXYZ019._-@", min_size=1, max_size=60), min_size=2, max_size=5)
        .map("/".join)
        .filter(lambda name: not {".", ".."} & set(name.split("/"))),
        st.binary(max_size=3000),
        max_size=8,
    )
)
def test_what_was_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    """Catches files that are lost, cut or renamed on the way, long names among them."""
    path = make(tmp_path_factory.mktemp("archive") / "a.tar.gz", files)
    found: dict[str, bytes] = {}
    contents = read_archive(path, lambda entry, source: found.update({entry.path: source.read()}))
    assert found == files
    assert {entry.path: entry.size_bytes for entry in contents.manifest.files} == {
        name: len(content) for name, content in files.items()
    }
    assert contents.about == HEAD == read_about(path)
    assert path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=60)
@given(st.data())
def test_any_changed_byte_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Catches damage that no checksum covers."""
    folder = tmp_path_factory.mktemp("archive")
    path = make(folder / "a.tar.gz")
    whole = gzip.decompress(path.read_bytes())
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(GZIP_HEADER_BYTES, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        read_archive(path)
    except (DataCorrupted, InvalidInput, Conflict):
        return
    # The same bytes may be packed in several ways, such as zeros by repeating one or two of them.
    assert gzip.decompress(content) == whole


@settings(max_examples=60)
@given(st.data())
def test_any_cut_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Catches a file that was not copied to its end and passes for a backup."""
    folder = tmp_path_factory.mktemp("archive")
    path = make(folder / "a.tar.gz")
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises((DataCorrupted, InvalidInput)):
        read_archive(path)


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, content: bytes = b"", **fields: Any) -> Member:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    for field, value in fields.items():
        setattr(header, field, value)
    return header, content


def members(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        found: list[Member] = []
        for header in tar:
            source = tar.extractfile(header)
            assert source is not None
            found.append((header, source.read()))
        return found


def packed(path: Path, *wanted: Member) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for header, content in wanted:
            tar.addfile(header, io.BytesIO(content))
    path.write_bytes(gzip.compress(buffer.getvalue()))


def with_head(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (_, head), *others = members(path)
        packed(path, member(ABOUT, json.dumps({**json.loads(head), **changes}).encode()), *others)

    return change


def with_members(choose: Callable[[list[Member]], list[Member]]) -> Callable[[Path], None]:
    return lambda path: packed(path, *choose(members(path)))


def inserted(*added: Member) -> Callable[[Path], None]:
    return with_members(lambda found: [*found[:-1], *added, found[-1]])


BAD: dict[str, tuple[Callable[[Path], object], type[AgenticFlowError], str]] = {
    "not there": (Path.unlink, PathNotFound, "cannot be read"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), PathNotFound, "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), InvalidInput, "no backup"),
    "a text": (lambda path: path.write_text("no archive"), InvalidInput, "no backup"),
    "packed text": (lambda path: path.write_bytes(gzip.compress(b"text" * 999)), InvalidInput, "no backup"),
    "packed nothing": (lambda path: path.write_bytes(gzip.compress(b"")), InvalidInput, "no backup"),
    "somebody's tar": (lambda path: packed(path, member("etc/passwd", b"root")), InvalidInput, "etc/passwd"),
    "somebody's head": (with_head(product="another"), InvalidInput, "another"),
    "a newer format": (with_head(format=FORMAT + 1), Conflict, f"format {FORMAT + 1}"),
    "a newer program": (with_head(product_version="99.1.0"), Conflict, "99.1.0"),
    "a head with more": (with_head(colour="red"), DataCorrupted, "about.json"),
    "a path upwards": (inserted(member("data/../../evil", b"x")), DataCorrupted, "evil"),
    "an absolute path": (inserted(member("/data/evil", b"x")), DataCorrupted, "evil"),
    "a hidden dot": (inserted(member("data/./evil", b"x")), DataCorrupted, "evil"),
    "a top-level file": (inserted(member("evil", b"x")), DataCorrupted, "evil"),
    "a strange name": (inserted(member("data/ev\nil", b"x")), DataCorrupted, "ev"),
    "a link": (
        inserted(member("data/link", type=tarfile.SYMTYPE, linkname="/etc")), DataCorrupted, "data/link"
    ),
    "a hard link": (
        inserted(member("data/link", type=tarfile.LNKTYPE, linkname="data/audit.db")), DataCorrupted, "link"
    ),
    "a device": (inserted(member("data/null", type=tarfile.CHRTYPE)), DataCorrupted, "data/null"),
    "a file twice": (inserted(member("data/audit.db")), DataCorrupted, "audit.db"),
    "a file too many": (inserted(member("data/more", b"x")), DataCorrupted, "data/more"),
    "a file too few": (with_members(lambda found: [found[0], *found[2:]]), DataCorrupted, "identity.db"),
    "another content": (
        with_members(lambda found: [found[0], member("data/identity.db", b"KEYS" * 5000), *found[2:]]),
        DataCorrupted,
        "checksum",
    ),
    "no end": (with_members(lambda found: found[:-1]), DataCorrupted, "end is missing"),
    "more after the end": (
        with_members(lambda found: [*found, member("data/late", b"x")]), DataCorrupted, "after the end"
    ),
    "a broken end": (
        with_members(lambda found: [*found[:-1], member(MANIFEST, b"{")]), DataCorrupted, MANIFEST
    ),
    "more after the archive": (
        lambda path: path.write_bytes(path.read_bytes() + b"more"), DataCorrupted, "damaged"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_whole_backup_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    """Catches a file that gets in, an error without a hint or of the wrong kind, and half a restore."""
    spoil, kind, said = BAD[case]
    path = make(tmp_path / "a.tar.gz")
    spoil(path)
    before = sorted(tmp_path.rglob("*"))
    for attempt in (lambda: read_archive(path), lambda: restore_folder(path, tmp_path / "restored")):
        with pytest.raises(kind) as raised:
            attempt()
        assert type(raised.value) is kind
        assert said in raised.value.message
        assert raised.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_backup_that_fails_leaves_nothing_and_takes_nobodys_place(tmp_path: Path) -> None:
    """Catches half a file under the final name, a rest beside it, and an older backup that is overwritten."""
    path = tmp_path / "a.tar.gz"

    def fail() -> None:
        with new_archive(path) as sink, ArchiveWriter(sink, HEAD) as archive:
            archive.add_bytes("data/x", b"x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []
    make(path)
    before = path.read_bytes()
    with pytest.raises(Conflict, match="exists"):
        make(path)
    assert path.read_bytes() == before
    assert __version__ == read_about(path).product_version
