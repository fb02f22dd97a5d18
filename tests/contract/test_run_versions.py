"""Processes of two builds on one run database, in SQLite."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentic_flow.swarm.engine import SqlRunEngine
from agentic_flow.swarm.leases import RunDatabase
from agentic_flow.testing.run_engine_case import RunEngineCase
from agentic_flow.testing.run_engine_versions_contract import VERSION_CHECKS, VersionsCase


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for all checks: the columns of one are there for the next."""
    return tmp_path_factory.mktemp("engine")


@pytest.mark.parametrize("check", VERSION_CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[VersionsCase], Awaitable[None]], store: Path) -> None:
    """Catches whatever the docstring of the check says."""

    def make(**options: Any) -> SqlRunEngine:
        options.setdefault("runs_parallel_max", 8)
        return SqlRunEngine(None, store, lease_s=5.0, **options)

    async def main() -> None:
        database = RunDatabase(None, store, pooled=False)
        await check(VersionsCase(RunEngineCase(make, secrets.token_hex(4)), database))

    asyncio.run(main())
