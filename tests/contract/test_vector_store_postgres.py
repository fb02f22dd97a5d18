"""The VectorStore contract on PostgreSQL with pgvector: a real server, a fresh database for each scenario."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_flow.agentdb.postgres.encoding import KEY_BYTES_MAX, escape, index_key, unescape
from agentic_flow.agentdb.postgres.store import PostgresAgentDB
from agentic_flow.core.settings import AgentDBSettings
from agentic_flow.testing import vector_store_contract
from postgres_server import TEMPLATE, make_template, new_database, postgres_server

pytestmark = pytest.mark.anyio

texts = st.text(st.sampled_from("\x00\x01\x02\x03aé🙂"), max_size=6)


@given(texts, texts)
def test_escaped_text_keeps_order(one: str, other: str) -> None:
    """Catches an escape that PostgreSQL cannot hold, that is lost on the way back, or that reorders."""
    assert "\0" not in escape(one)
    assert unescape(escape(one)) == one
    assert (escape(one).encode() < escape(other).encode()) == (one < other)


@given(texts, st.text(st.sampled_from("\x01\x03a🙂"), min_size=1, max_size=4), st.integers(400, 1100))
def test_index_keys_are_short_and_unlike(one: str, part: str, count: int) -> None:
    """Catches an id that no index entry can hold, and two ids with one entry."""
    long = part * count
    key, whole = index_key(long)
    assert len(key.encode()) <= KEY_BYTES_MAX
    assert unescape(whole or key) == long
    assert index_key(long + "a")[0] != key
    assert (index_key(one)[0] == key) == (one == long)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    """A server of this module's own, with a migrated template database."""
    with postgres_server(tmp_path_factory.mktemp("postgres")) as url:
        make_template(url)
        yield url


@pytest.fixture
def url(server: str) -> str:
    """A database with our schema and nothing in it."""
    return new_database(server, template=TEMPLATE)


@pytest.mark.parametrize("check", vector_store_contract.ALWAYS, ids=lambda check: check.__name__)
async def test_contract(check: vector_store_contract.Scenario, url: str) -> None:
    """Catches a store that breaks a promise of the port; each scenario names its own."""
    async with PostgresAgentDB(url, AgentDBSettings()) as store:
        await check(store)


async def test_scenarios_share_a_store(url: str) -> None:
    """Catches state of one tenant or namespace that changes what another scenario sees."""
    async with PostgresAgentDB(url, AgentDBSettings()) as store:
        ran = await vector_store_contract.run_all(store)
        assert len(ran) == len(set(ran)) == len(vector_store_contract.ALWAYS)


@pytest.mark.parametrize("seed", [1, 2])
async def test_tenants_never_meet(seed: int, url: str) -> None:
    """Catches a row of one tenant that another can read, find, count, change or erase."""
    async with PostgresAgentDB(url, AgentDBSettings()) as store:
        await vector_store_contract.tenants_never_meet(store, seed=seed)
