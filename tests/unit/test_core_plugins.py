"""Plugins: real distributions on a real path, found, loaded and blamed by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentic_flow.core import plugins
from agentic_flow.core.errors import Conflict, InvalidSettings, NotFound

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes distributions as an installer would, into a folder on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)

    def put(distribution: str, name: str, value: str, source: str = "", module: str | None = None) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[agentic_flow.providers]\n{name} = {value}\n")
        (tmp_path / f"{module or value.partition(':')[0]}.py").write_text(source)

    yield put
    for module in set(sys.modules) - modules:
        del sys.modules[module]


def test_a_registered_object_is_loaded_by_name(install: Install) -> None:
    """Catches plugins that are installed and never found."""
    install("their-embedder", "theirs", "their_module:build", "def build(): return 42")
    assert "theirs" in plugins.names("agentic_flow.providers")
    assert plugins.load("agentic_flow.providers", "theirs")() == 42
    assert plugins.load_all("agentic_flow.providers")["theirs"]() == 42


def test_an_unknown_name_lists_what_there_is(install: Install) -> None:
    """Catches an error that leaves the reader guessing."""
    install("their-embedder", "theirs", "their_module:build", "build = 1")
    with pytest.raises(NotFound) as caught:
        plugins.load("agentic_flow.providers", "ours")
    assert "theirs" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("source", "words"), [("import no_such_module", "no_such_module"), ("x = 1", "build"), ("1/0", "Zero")]
)
def test_a_plugin_that_fails_is_named_with_its_distribution(
    install: Install, source: str, words: str
) -> None:
    """Catches a bare ImportError from somebody else's code."""
    install("their-embedder", "theirs", "their_module:build", source)
    with pytest.raises(InvalidSettings) as caught:
        plugins.load("agentic_flow.providers", "theirs")
    assert "'their-embedder 1.2'" in caught.value.message
    assert "'theirs' (their_module:build)" in caught.value.message
    assert words in caught.value.message


def test_two_distributions_cannot_claim_one_name(install: Install) -> None:
    """Catches an order of installation that decides which plugin runs."""
    install("one", "same", "module_one:build")
    install("two", "same", "module_two:build")
    with pytest.raises(Conflict) as caught:
        plugins.load("agentic_flow.providers", "same")
    assert "one 1.2" in caught.value.message
    assert "two 1.2" in caught.value.message
