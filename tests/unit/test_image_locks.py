"""The locks of the images are parts of the one that everything is tested with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
_PIN = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def pins(lock: str) -> set[tuple[str, str]]:
    """Name and version of everything that a lock pins."""
    return set(_PIN.findall((REQUIREMENTS / lock).read_text("utf-8")))


@pytest.mark.parametrize(
    ("lock", "without"), [("image-agentdb.txt", "pydantic-ai-slim"), ("image-swarm.txt", "faiss-cpu")]
)
def test_images_have_versions_that_the_tests_ran_with(lock: str, without: str) -> None:
    """Catches a lock of an image that was not compiled again, or that holds what it should leave out."""
    assert pins(lock) < pins("runtime.txt")
    assert without not in {name for name, _ in pins(lock)}


def test_plots_need_no_other_versions() -> None:
    """Catches a lock of plots that would install another numpy over the one of runtime.txt."""
    runtime = dict.fromkeys(name for name, _ in pins("runtime.txt"))
    shared = {(name, version) for name, version in pins("image-plot.txt") if name in runtime}
    assert shared
    assert shared <= pins("runtime.txt")
