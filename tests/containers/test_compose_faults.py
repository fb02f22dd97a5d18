"""Faults of the main stack: each shows on the health routes, heals by itself, and loses nothing accepted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine import Engine
from faults import SERVICES, death_of_all_then_whole, fault_then_whole, main_stack
from images import Images
from stacks import Stack

CASES = [("kill", "proxy"), *((fault, name) for fault in ("kill", "pause", "partition") for name in SERVICES)]


@pytest.fixture(scope="module")
def stack(engine: Engine, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One for all tests here."""
    with main_stack(engine, images, tmp_path_factory.mktemp("faults")) as made:
        yield made


@pytest.mark.parametrize(("fault", "service"), CASES)
def test_a_fault_is_seen_heals_and_loses_nothing(stack: Stack, fault: str, service: str) -> None:
    """Catches a fault that health hides, that stays when its cause has gone, or that loses something."""
    fault_then_whole(stack, fault, service)


def test_the_whole_stack_killed_comes_back_whole(stack: Stack) -> None:
    """Catches what only the death of all loses: writes in nobody's memory, runs that nobody takes over."""
    death_of_all_then_whole(stack)
