"""Secrets: re-read when rotated, encrypted at rest, never garbage."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from agentic_flow.core.errors import DataCorrupted, InvalidInput, InvalidSettings
from agentic_flow.core.secrets import FileSecret, PlainSecret, SecretStore, StoredSecret, resolve


def test_a_rotated_file_is_read_again(tmp_path: Path) -> None:
    """Catches a cache that misses a rewrite, a replacement, and a swapped symlink (Kubernetes)."""
    path = tmp_path / "key"
    path.write_text("one\n")
    secret = FileSecret(path)
    assert secret.get() == "one"
    path.write_text("two longer")
    assert secret.get() == "two longer"
    (tmp_path / "next").write_text("six-letter")
    os.utime(tmp_path / "next", ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    os.replace(tmp_path / "next", path)
    assert secret.get() == "six-letter"
    (tmp_path / "mounted").write_text("from a mount")
    path.unlink()
    path.symlink_to(tmp_path / "mounted")
    assert secret.get() == "from a mount"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe", b"x" * 70_000])
def test_a_file_without_a_secret_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    """Catches an empty key sent to a provider, and the old value kept in place of an error."""
    path = tmp_path / "key"
    path.write_text("old")
    secret = FileSecret(path)
    secret.get()
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InvalidSettings, match="key"):
        secret.get()


def test_the_file_wins_over_the_value_and_the_value_over_the_store(tmp_path: Path) -> None:
    """Catches a rotation that does nothing because an old value stands beside it."""
    path = tmp_path / "key"
    path.write_text("file")
    stored = PlainSecret(SecretStr("stored"))
    assert resolve(SecretStr("plain"), path, stored).get() == "file"
    assert resolve(SecretStr("plain"), None, stored).get() == "plain"
    assert resolve(None, None, stored).get() == "stored"
    assert resolve(None, None).get() is None


def test_the_store_keeps_secrets_across_openings_and_in_no_readable_form(tmp_path: Path) -> None:
    """Catches plain text on disk, files that others can read, and values lost or mixed up."""
    store = SecretStore(tmp_path / "data")
    store.set("anthropic.api_key", "sk-ant-värdefull")
    store.set("b", "second")
    store.set("b", "third")
    again = SecretStore(tmp_path / "data")
    assert again.names() == ["anthropic.api_key", "b"]
    assert again.get("anthropic.api_key") == "sk-ant-värdefull"
    assert again.get("b") == StoredSecret(again, "b").get() == "third"
    assert again.get("absent") is None
    for file in (tmp_path / "data").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert b"third" not in file.read_bytes()
    assert again.delete("b")
    assert not again.delete("b")
    assert store.names() == ["anthropic.api_key"]
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == [
        "secrets.json",
        "secrets.key",
        "secrets.lock",
    ]


def test_a_wrong_key_is_an_error_for_reading_and_for_writing(tmp_path: Path) -> None:
    """Catches garbage instead of an error, and a store of which no key opens all."""
    store = SecretStore(tmp_path, key_file=tmp_path / "keys" / "one")
    store.set("a", "value")
    other = SecretStore(tmp_path / "other", key_file=tmp_path / "keys" / "two")
    other.set("x", "y")
    wrong = SecretStore(tmp_path, key_file=tmp_path / "keys" / "two")
    with pytest.raises(DataCorrupted, match="'a'"):
        wrong.get("a")
    with pytest.raises(DataCorrupted):
        wrong.set("b", "value")
    gone = SecretStore(tmp_path, key_file=tmp_path / "keys" / "three")
    with pytest.raises(DataCorrupted, match="gone"):
        gone.get("a")
    with pytest.raises(DataCorrupted, match="gone"):
        gone.set("b", "value")
    assert not (tmp_path / "keys" / "three").exists()
    (tmp_path / "keys" / "three").write_text("short")
    with pytest.raises(DataCorrupted, match="not a key"):
        gone.get("a")
    assert store.get("a") == "value"


def test_swapped_and_altered_entries_are_noticed(tmp_path: Path) -> None:
    """Catches one secret passed off as another, which encryption without the name would allow."""
    store = SecretStore(tmp_path)
    store.set("a", "for a")
    store.set("b", "for b")
    path = tmp_path / "secrets.json"
    document = json.loads(path.read_text())
    entries = document["entries"]
    path.write_text(json.dumps({**document, "entries": {"a": entries["b"], "b": entries["a"]}}))
    for name in ("a", "b"):
        with pytest.raises(DataCorrupted):
            store.get(name)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2, "entries": {}}', '{"format": 1}'])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: str) -> None:
    """Catches a damaged store that reads as empty and is then overwritten."""
    (tmp_path / "secrets.json").write_text(content)
    store = SecretStore(tmp_path)
    with pytest.raises(DataCorrupted):
        store.names()
    with pytest.raises(DataCorrupted):
        store.set("a", "b")
    assert (tmp_path / "secrets.json").read_text() == content


@pytest.mark.parametrize("name", ["", "A", "a/b", "a" * 65, "a b", "ä", "a\n"])
def test_wrong_names_are_refused(tmp_path: Path, name: str) -> None:
    """Catches names that mean a path or differ only in case."""
    with pytest.raises(InvalidInput):
        SecretStore(tmp_path).set(name, "x")


def test_writers_of_several_processes_take_turns(tmp_path: Path) -> None:
    """Catches a secret lost because two processes wrote at once."""
    program = (
        "import sys; from pathlib import Path; from agentic_flow.core.secrets import SecretStore\n"
        "store = SecretStore(Path(sys.argv[1]))\n"
        "for n in range(20): store.set(f'{sys.argv[2]}-{n}', 'value')\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), who], env=dict(os.environ))
        for who in ("a", "b")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    store = SecretStore(tmp_path)
    assert len(store.names()) == 40
    assert {store.get(name) for name in store.names()} == {"value"}
