"""The floors of the house: imports go down only, and siblings do not know each other."""

from __future__ import annotations

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent


def test_imports_go_down_the_floors() -> None:
    """Catches an import that points up or sideways, and a new package that has no floor."""
    outcome = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert outcome == 0, "the contracts of pyproject.toml are broken; the output above shows the chains"
