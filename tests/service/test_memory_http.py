"""Memory over HTTP: the real server on real ports, by the twin, through a whole turn of learning."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from agentic_flow.core.auth import LOCAL_OWNER, Principal
from agentic_flow.core.clock import SystemClock
from agentic_flow.core.errors import Forbidden, InvalidInput, NotFound, Unauthenticated, Unavailable
from agentic_flow.core.settings import load
from agentic_flow.memory.answers import Edit, Note
from agentic_flow.memory.records import Trajectory, TrajectoryStep, Verdict
from agentic_flow.memory.remote import RemoteMemory
from agentic_flow.memory.routes import DOCUMENT_PATH, build_routes, openapi_document, operations
from agentic_flow.memory.service import Memory
from agentic_flow.runtime.admin import administer
from agentic_flow.runtime.build import Runtime
from agentic_flow.runtime.platform import serve_services

pytestmark = pytest.mark.anyio

TASK = "run the linter on the changed file"


@asynccontextmanager
async def serving(data_dir: Path, *names: str, **more: object) -> AsyncIterator[dict[str, str]]:
    """These services of a data folder, at their URLs."""
    ports = {f"serve.{name}_port": 0 for name in ("platform", "agentdb", "swarm")}
    settings = load({"data_dir": str(data_dir), **ports, **more}).settings
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    served = asyncio.create_task(
        serve_services(
            settings, list(names), on_ready=ready.set_result, stop=stop, on_owner_key=lambda _: None
        )
    )
    await asyncio.wait({served, ready}, return_when=asyncio.FIRST_COMPLETED)
    if served.done():
        served.result()
    yield ready.result()
    stop.set()
    await served


@pytest.fixture
async def urls(tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    async with serving(tmp_path, "all") as found:
        yield found


def lint_run(number: int, recall_id: str, cited: str) -> Trajectory:
    step = TrajectoryStep(name="tool:shell", action="ruff check", observation="no problems")
    return Trajectory(
        id=f"lint-{number}",
        task=TASK,
        outcome="completed",
        answer="done",
        recall_id=recall_id,
        cited=(cited,),
        steps=(step,),
    )


@pytest.mark.parametrize("port", ["platform", "agentdb"])
async def test_a_turn_of_learning(port: str, urls: dict[str, str]) -> None:
    """Catches a route that is not there, a use that is not credited, a recall without its certificate."""
    async with RemoteMemory(urls[port]) as memory:
        kept = await memory.add(
            LOCAL_OWNER,
            Note(title="Run the linter first", content="Its messages name the changed file and line."),
        )
        recall = await memory.recall(LOCAL_OWNER, TASK)
        assert [one.item.id for one in recall.items] == [kept.id]
        assert f"[{kept.id}]" in recall.context
        before = await memory.explain(LOCAL_OWNER, kept.id)
        await memory.record(LOCAL_OWNER, lint_run(1, recall.id, kept.id))
        await memory.add_verdict(LOCAL_OWNER, "lint-1", Verdict(outcome="success", source="person"))
        # The server may be learning from the run without the verdict at that moment: once more then.
        report = await memory.learn(LOCAL_OWNER, timeout_s=60)
        assert (report.settled, report.waiting, report.failed) == (True, 0, 0)
        after = await memory.explain(LOCAL_OWNER, kept.id)
        assert after.belief.mean > before.belief.mean
        assert (await memory.trajectory(LOCAL_OWNER, "lint-1")).state == "learned"
        # The person changes their mind: the credit is replaced, not added.
        await memory.add_verdict(LOCAL_OWNER, "lint-1", Verdict(outcome="failure", source="person"))
        await memory.learn(LOCAL_OWNER, timeout_s=60)
        assert (await memory.explain(LOCAL_OWNER, kept.id)).belief.mean < before.belief.mean
        checked = await memory.verify(LOCAL_OWNER)
        assert (checked.whole, checked.certificates) == (True, 1)
        assert (await memory.uplift(LOCAL_OWNER)).recalls == 1
        status = await memory.status(LOCAL_OWNER)
        assert (status.trajectories["learned"], status.recalls, status.skills) == (1, 1, 0)


class PastClock(SystemClock):
    """The time so many days ago."""

    def __init__(self, days: float) -> None:
        self.ago_s = days * 86_400.0

    def time_s(self) -> float:
        return super().time_s() - self.ago_s


async def test_retention_prunes_recalls_with_their_trajectories(tmp_path: Path) -> None:
    """Catches a server under which certificates of recalls stay for ever, go before the trajectory that needs
    them, or go in a way that breaks the chain."""
    settings = load({"data_dir": str(tmp_path), "memory.retention_days": 30}).settings
    async with Runtime(settings) as runtime:
        store = await runtime.store()
        old, recent = (
            Memory(store, settings.memory, clock=PastClock(days), rng=random.Random(1)) for days in (31, 29)
        )
        note = Note(title="Run the linter first", content="Its messages name the changed file and line.")
        kept = await old.add(LOCAL_OWNER, note)
        for number in (1, 2, 3):
            shown = await old.recall(LOCAL_OWNER, TASK, recall_id=f"r{number}")
            assert [one.item.id for one in shown.items] == [kept.id]
        await recent.recall(LOCAL_OWNER, TASK, recall_id="r4")
        # One ended then, one went on until two days later; to one recall there never was a run.
        began_s = PastClock(31).time_s()
        for number, clock in ((2, PastClock(31)), (3, PastClock(29))):
            run = lint_run(number, f"r{number}", kept.id)
            times = {"started_at_s": began_s, "ended_at_s": clock.time_s()}
            assert await old.records.keep(LOCAL_OWNER.tenant, run.model_copy(update=times))
        before = await old.verify(LOCAL_OWNER)
        assert (before.whole, before.certificates) == (True, 4)
    async with (
        serving(tmp_path, "all", **{"memory.retention_days": 30}) as urls,
        RemoteMemory(urls["platform"]) as memory,
        asyncio.timeout(60),
    ):
        while not (found := await memory.verify(LOCAL_OWNER)).pruned:
            await asyncio.sleep(0.05)
        assert (found.whole, found.pruned, found.certificates, found.first_sequence) == (True, 2, 2, 3)
        with pytest.raises(NotFound):
            await memory.trajectory(LOCAL_OWNER, "lint-2")
        assert (await memory.trajectory(LOCAL_OWNER, "lint-3")).recall_id == "r3"
        assert (await memory.verify(LOCAL_OWNER, "r3")).asked is not None
        await memory.recall(LOCAL_OWNER, TASK, recall_id="r5")
        after = await memory.verify(LOCAL_OWNER)
        assert (after.whole, after.last_sequence) == (True, 5)


async def test_bad_input_is_refused(urls: dict[str, str]) -> None:
    """Catches a 500, or a change, for what does not exist or says nothing."""
    async with RemoteMemory(urls["platform"]) as memory:
        with pytest.raises(InvalidInput):
            await memory.recall(LOCAL_OWNER, "  ")
        for unknown in (
            memory.explain(LOCAL_OWNER, "nobody"),
            memory.edit(LOCAL_OWNER, "nobody", Edit(title="a title")),
            memory.trajectory(LOCAL_OWNER, "nobody"),
            memory.add_verdict(LOCAL_OWNER, "nobody", Verdict(outcome="success", source="person")),
        ):
            with pytest.raises(NotFound):
                await unknown
        assert not await memory.forget(LOCAL_OWNER, "nobody")
        assert (await memory.items(LOCAL_OWNER)).items == ()


class Key:
    """TokenSource of one key."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def token(self, principal: Principal) -> str | None:
        return self._key

    def forget(self, principal: Principal) -> None:
        """A key is kept."""


def renamed(number: int, old: str, new: str, path: str) -> Trajectory:
    """A run of the like task by the same two tools."""
    steps = (
        TrajectoryStep(name="tool:file_search", action=json.dumps({"pattern": old}), observation=path),
        TrajectoryStep(
            name="tool:file_edit",
            action=json.dumps({"path": path, "old": old, "new": new}),
            observation="1 change",
        ),
    )
    return Trajectory(
        id=f"rename-{number}",
        task=f"rename the function {old} to {new} in the file {path}",
        outcome="completed",
        answer="renamed",
        steps=steps,
    )


async def test_skills_are_learned_used_and_rated(urls: dict[str, str]) -> None:
    """Catches a skill that the wire loses: its holes, its versions, or how its use went."""
    success = Verdict(outcome="success", source="test")
    async with RemoteMemory(urls["platform"]) as memory:
        for number, (old, new, path) in enumerate(
            (("alpha", "beta", "src/a.py"), ("gamma", "delta", "lib/b.py"), ("omega", "sigma", "app/c.py"))
        ):
            await memory.record(LOCAL_OWNER, renamed(number, old, new, path))
            await memory.add_verdict(LOCAL_OWNER, f"rename-{number}", success)
        await memory.learn(LOCAL_OWNER)
        (skill,) = (await memory.list_skills(LOCAL_OWNER)).skills
        (found,) = await memory.find_skills(LOCAL_OWNER, "rename the function one to two in the file c.py")
        assert found.skill == skill == await memory.show_skill(LOCAL_OWNER, skill.id)
        assert found.parameters is not None
        steps = await memory.use_skill(LOCAL_OWNER, skill.id, found.parameters)
        assert steps[1].arguments == {"path": "c.py", "old": "one", "new": "two"}
        with pytest.raises(InvalidInput):
            await memory.use_skill(LOCAL_OWNER, skill.id, {"no_such_hole": "x"})
        with pytest.raises(NotFound):
            await memory.use_skill(LOCAL_OWNER, skill.id, found.parameters, version=99)
        for _ in range(2):  # once a run, however often it is said
            rated = await memory.record_skill_use(LOCAL_OWNER, skill.id, "rename-9", success)
        assert rated.current.successes == 1
        assert await memory.forget_skill(LOCAL_OWNER, skill.id)
        assert not await memory.forget_skill(LOCAL_OWNER, skill.id)


async def test_tries_are_assessed_contrasted_and_told(urls: dict[str, str]) -> None:
    """Catches a failed try that the next one is not told of, and a contrast that keeps nothing."""
    good = renamed(1, "alpha", "beta", "src/a.py")
    step = TrajectoryStep(name="tool:shell_run", action="sed -i s/alpha/beta/", error="not allowed")
    bad = good.model_copy(
        update={"id": "rename-2", "outcome": "failed", "answer": "", "error": "refused", "steps": (step,)}
    )
    async with RemoteMemory(urls["platform"]) as memory:
        for one in (good, bad):
            await memory.record(LOCAL_OWNER, one)
        assert (await memory.assess(LOCAL_OWNER, good.id)).verdict.outcome == "success"
        assessed = await memory.assess(LOCAL_OWNER, bad.id)
        assert assessed.verdict.outcome == "failure"
        assert assessed.episode == await memory.show_episode(LOCAL_OWNER, bad.id)
        assert (await memory.list_episodes(LOCAL_OWNER)).episodes == (assessed.episode,)
        told = await memory.tries(LOCAL_OWNER, good.task)
        assert [one.id for one in told.tries] == [bad.id]
        assert "not allowed" in told.context
        own = await memory.tries(LOCAL_OWNER, good.task, k=0, of=[good.id, bad.id, "nobody"])
        assert [one.id for one in own.tries] == [good.id, bad.id]
        small = await memory.tries(LOCAL_OWNER, good.task, tokens_max=20)
        assert (small.tries, small.context, small.tokens) == ((), "", 0)
        found = await memory.contrast(LOCAL_OWNER, [bad, good])
        assert found.best == good.id
        assert {item.lesson for item in found.items} == {"do", "avoid"}
        for kept in found.kept:
            await memory.explain(LOCAL_OWNER, kept.merged_into or kept.id)
        other = renamed(3, "x", "y", "z.py")
        for wrong in ([good, other], [good, good], []):
            with pytest.raises(InvalidInput):
                await memory.contrast(LOCAL_OWNER, wrong)
        with pytest.raises(NotFound):
            await memory.assess(LOCAL_OWNER, "nobody")
        assert await memory.forget_episode(LOCAL_OWNER, bad.id)


async def test_a_database_by_itself_keeps_and_does_not_learn(tmp_path: Path) -> None:
    """Catches a database that pretends to learn without any model, or loses what waits for one."""
    async with serving(tmp_path, "agentdb") as urls, RemoteMemory(urls["agentdb"]) as memory:
        await memory.record(LOCAL_OWNER, renamed(1, "alpha", "beta", "a.py"))
        with pytest.raises(Unavailable):
            await memory.learn(LOCAL_OWNER)
        with pytest.raises(Unavailable):
            await memory.assess(LOCAL_OWNER, "rename-1")
        assert (await memory.status(LOCAL_OWNER)).trajectories["pending"] == 1


async def test_a_key_reaches_its_tenant_with_its_scopes(tmp_path: Path) -> None:
    """Catches a key that reads another tenant's memory, writes with a scope to read, or reads without any."""
    flags = {"data_dir": str(tmp_path), "auth.required": True}

    def make_keys() -> Mapping[str, str]:
        def key(tenant: str, *scopes: str) -> str:
            _, text = administer(
                load(flags).settings, lambda admin: admin.create_key(tenant, "somebody", list(scopes))
            )
            return text

        for tenant in ("team-a", "team-b"):
            administer(load(flags).settings, lambda admin, name=tenant: admin.create_tenant(name))
        return {
            "a": key("team-a", "memory:read", "memory:write"),
            "b": key("team-b", "memory:read", "memory:write"),
            "reads": key("team-a", "memory:read"),
            "writes": key("team-a", "memory:write"),
            "runs": key("team-a", "runs:read"),
        }

    keys = await asyncio.to_thread(make_keys)
    note = Note(title="Run the linter first", content="Its messages name the changed file and line.")
    async with serving(tmp_path, "all", **{"auth.required": True}) as urls:
        for port in ("platform", "agentdb"):

            def reach(name: str, url: str = urls[port]) -> RemoteMemory:
                return RemoteMemory(url, tokens=Key(keys[name]))

            async with reach("a") as a, reach("b") as b, reach("reads") as reads, reach("writes") as writes:
                # Whoever the client believes to be, the key decides.
                kept = await a.add(LOCAL_OWNER, note)
                await a.record(LOCAL_OWNER, renamed(1, "alpha", "beta", f"{port}.py"))
                mine = kept.merged_into or kept.id
                assert mine in {one.id for one in (await reads.items(LOCAL_OWNER)).items}
                assert (await b.items(LOCAL_OWNER)).items == ()
                assert (await b.trajectories(LOCAL_OWNER)).trajectories == ()
                assert (await b.recall(LOCAL_OWNER, TASK)).items == ()
                assert await b.similar(LOCAL_OWNER, renamed(1, "alpha", "beta", "a.py").task) == []
                assert not await b.forget(LOCAL_OWNER, mine)
                for hidden in (b.explain(LOCAL_OWNER, mine), b.trajectory(LOCAL_OWNER, "rename-1")):
                    with pytest.raises(NotFound):
                        await hidden
                for refused in (
                    reads.add(LOCAL_OWNER, note),
                    reads.forget(LOCAL_OWNER, mine),
                    reads.learn(LOCAL_OWNER),
                    reads.contrast(LOCAL_OWNER, [renamed(1, "alpha", "beta", "a.py")]),
                    writes.items(LOCAL_OWNER),
                    writes.recall(LOCAL_OWNER, TASK),
                    writes.list_skills(LOCAL_OWNER),
                ):
                    with pytest.raises(Forbidden):
                        await refused
            async with reach("runs") as neither:
                with pytest.raises(Forbidden):
                    await neither.status(LOCAL_OWNER)


def test_every_route_is_documented() -> None:
    """Catches a route beside the table, and a reference in the document that leads nowhere."""
    document = openapi_document()
    served_here = {
        (route.path, method.lower())
        for route in build_routes(None)  # type: ignore[arg-type]
        for method in (route.methods or ())
        if method != "HEAD" and route.path != DOCUMENT_PATH
    }
    documented = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert served_here == documented
    names = [operation.name for operation in operations(None)]
    assert len(set(names)) == len(names)
    text = json.dumps(document)
    for name in set(text.split('"#/components/schemas/')[1:]):
        assert name.partition('"')[0] in document["components"]["schemas"]


async def test_the_document_needs_no_key_and_the_rest_does(tmp_path: Path) -> None:
    """Catches data behind a public path, or a document that a client cannot read before it has a key."""
    async with (
        serving(tmp_path, "all", **{"auth.required": True}) as urls,
        aiohttp.ClientSession() as session,
    ):
        for port in ("platform", "agentdb"):
            async with session.get(urls[port] + DOCUMENT_PATH) as answer:
                assert answer.status == 200
                assert (await answer.json())["paths"].keys() == openapi_document()["paths"].keys()
            for operation in operations(None):
                async with session.request(operation.method, urls[port] + operation.path) as answer:
                    assert answer.status == 401, operation.name
        async with RemoteMemory(urls["platform"]) as memory:
            with pytest.raises(Unauthenticated):
                await memory.status(LOCAL_OWNER)
