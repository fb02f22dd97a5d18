"""Memory under `kill -9`: no acknowledged trajectory is lost, and none counts twice.

Sizes: `MEMORY_KILLS` lives of a process that records and learns (default 40).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import memory_learner
import pytest
from memory_learner import SHOWN, TENANT, parts, store_in

from postgres_server import TEMPLATE, make_template, new_database, postgres_server

pytestmark = pytest.mark.anyio

LIVES = int(os.environ.get("MEMORY_KILLS", "40"))
EACH = 6
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
"""For libraries in a process that forks: their threads would not be there in the child."""


def noted(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generator[str | None]:
    """Of a database with our schema and nothing in it, or None: the store is in the folder."""
    if request.param == "sqlite":
        yield None
        return
    with postgres_server(tmp_path_factory.mktemp("postgres")) as server:
        make_template(server)
        yield new_database(server, template=TEMPLATE)


@pytest.mark.timeout(600)
async def test_killed_at_random_everything_is_learned_once(tmp_path: Path, url: str | None) -> None:
    """Catches a trajectory that was acknowledged and is gone or never learned from, items or credits that
    count twice because learning was begun twice, and rows that a crash left unreadable."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    arguments = [str(tmp_path), str(LIVES), str(EACH), str(seed), *([url] if url else [])]
    driver = subprocess.Popen(
        [sys.executable, memory_learner.__file__, *arguments],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = driver.communicate()
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.communicate()
    assert driver.returncode == 0, err
    killed = int(out)
    acknowledged = noted(tmp_path / "acknowledged")
    print(f"{killed} kills, {len(acknowledged)} acknowledged, {len(noted(tmp_path / 'judged'))} judgements")
    assert killed > LIVES / 2, "the kills missed their moment"

    async with store_in(tmp_path, url) as store:
        trajectories, bank, learner = parts(store, tmp_path, LIVES + 1)
        await learner.settle(TENANT)
        assert learner.stats.failures == {}
        learned = {}
        cursor: str | None = None
        while True:
            page, cursor = await trajectories.list_trajectories(TENANT, cursor=cursor)
            learned |= {one.id: one for one in page}
            if cursor is None:
                break
        assert set(acknowledged) <= set(learned)
        # What was on disk and not yet acknowledged when the process died: at most one a life.
        assert len(set(learned) - set(acknowledged)) <= LIVES
        assert {one.state for one in learned.values()} == {"learned"}
        judged = Counter(noted(tmp_path / "judged"))
        assert set(judged) == set(learned)
        again = sum(times - 1 for times in judged.values())
        print(f"{again} judgements were begun again")

        for shown in SHOWN:
            told = await bank.explain(TENANT, shown)
            uses = [one for one in told.evidence if one.kind == "use"]
            counted = Counter(one.trajectory_id for one in uses)
            assert told.item.uses == len(learned)
            assert max(counted.values()) == 1
            assert set(counted) <= set(learned)
        items, cursor = await bank.list_items(TENANT, limit=1000)
        assert cursor is None
        sources = Counter(source.trajectory_id for item in items for source in item.sources)
        carried = {item.id for item in items}
        for one in learned.values():
            assert one.item_ids
            assert set(one.item_ids) <= carried
            assert sources[one.id] == len(one.item_ids)
