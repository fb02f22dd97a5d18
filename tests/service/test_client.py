"""The Python API, embedded: sync and async, runs one by one, and what happens when the caller goes away."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scripted_team import ANSWER_LINE, GOAL, TRUE_CITATION, make_folder, team

from agentic_flow import AsyncClient, Client
from agentic_flow.core.errors import Conflict, InvalidInput, NotFound, PathNotFound, UnknownModel
from agentic_flow.core.settings import Settings, load
from agentic_flow.testing.fake_provider import FakeProvider, Reply
from agentic_flow.testing.fake_wires import SeenRequest

QUESTION = "What switches the kettle off when the temperature reaches the limit?"


def settings_at(place: Path, provider: FakeProvider | None = None) -> Settings:
    flags: dict[str, object] = {"data_dir": str(place / "data")}
    if provider is not None:
        flags |= {
            "gateway.openai.base_url": provider.openai_url,
            "gateway.openai.api_key": "test-key",
            "gateway.model": "openai:some-model",
        }
    return load(flags, environ={}, directory=place, user_config=place / "none.toml").settings


def test_the_sync_client_does_the_whole_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a client that blocks itself, threads that share it badly, and logs on the caller's stdout."""
    folder = make_folder(tmp_path)
    with Client(settings=settings_at(tmp_path)) as client:
        events: list[str] = []
        result = client.run(QUESTION, input=folder, agents=1, on_event=lambda e: events.append(e.kind))
        assert result.state == "completed"
        assert result.citations[0].path == "kettle.py"
        assert events[-1] == "run_finished"
        with ThreadPoolExecutor(4) as pool:
            shown = list(pool.map(client.runs.show, [result.run_id] * 4))
        assert {run.answer for run in shown} == {result.answer}
        assert [run.run_id for run in client.runs.list(states=["completed"])] == [result.run_id]
        assert any(step.name == "tool:memory_search" for step in client.runs.steps(result.run_id))
        assert [model.id for model in client.models()] == ["extractive"]
        found = client.search("temperature limit", input=folder, k=2)
        assert found.hits
        assert client.runs.cancel(result.run_id) is False
        with pytest.raises(Conflict):
            client.runs.resume(result.run_id)
        with pytest.raises(NotFound):
            client.runs.show("run-of-nobody")
    with pytest.raises(Conflict):
        client.models()
    assert capfd.readouterr().out == ""


def test_the_async_client_takes_the_same_calls(tmp_path: Path) -> None:
    """Catches two clients that drift apart, and an idempotency key that starts a second run."""
    folder = make_folder(tmp_path)

    async def main(provider: FakeProvider) -> None:
        async with AsyncClient(settings=settings_at(tmp_path, provider)) as client:
            first = await client.runs.submit(GOAL, input=folder, agents=2, idempotency_key="one")
            assert await client.runs.submit(GOAL, input=folder, agents=2, idempotency_key="one") == first
            events = [event async for event in client.runs.events(first)]
            stored = [event for event in events if event.kind != "ingest_progress"]
            assert [event.sequence for event in stored] == list(range(1, len(stored) + 1))
            kinds = [event.kind for event in stored]
            assert (kinds[0], kinds[-1], kinds.count("run_finished")) == ("run_accepted", "run_finished", 1)
            assert kinds.count("agent_started") == kinds.count("agent_finished") > 0
            assert any(event.data.get("assignments") for event in stored if event.name == "assign")
            for after in (1, len(stored) // 2, len(stored)):
                assert [event async for event in client.runs.events(first, after=after)] == stored[after:]
            result = await client.runs.wait(first)
            assert ANSWER_LINE in result.answer
            assert result.citations[0].label == TRUE_CITATION
            assert len(await client.runs.list()) == 1

    with FakeProvider(team) as provider:
        asyncio.run(main(provider))
        assert provider.refused == []


def test_cancelling_the_call_cancels_the_run(tmp_path: Path) -> None:
    """Catches a caller who gave up while the run goes on spending."""
    folder = make_folder(tmp_path)

    async def main() -> None:
        asked = asyncio.Event()
        loop = asyncio.get_running_loop()

        def script(request: SeenRequest) -> Reply:
            loop.call_soon_threadsafe(asked.set)
            return Reply.broken("hang")

        with FakeProvider(script) as provider:
            async with AsyncClient(settings=settings_at(tmp_path, provider)) as client:
                call = asyncio.create_task(client.run(GOAL, input=folder))
                await asked.wait()
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                (run,) = await client.runs.list()
                assert run.state == "cancelled"

    asyncio.run(main())


def test_wrong_arguments_are_refused_before_anything_is_stored(tmp_path: Path) -> None:
    """Catches a refusal that only comes after a run exists."""
    with Client(settings=settings_at(tmp_path)) as client:
        with pytest.raises(PathNotFound, match="nowhere"):
            client.run(QUESTION, input=tmp_path / "nowhere")
        with pytest.raises(UnknownModel, match="gpt-of-nobody"):
            client.run(QUESTION, model="gpt-of-nobody")
        with pytest.raises(InvalidInput, match="tree"):
            client.run(QUESTION, topology="tree")
        with pytest.raises(InvalidInput, match="agents 65"):
            client.run(QUESTION, agents=65)
        with pytest.raises(InvalidInput, match="either"):
            client.search("words")
        assert client.runs.list() == []
    with pytest.raises(InvalidInput, match="ftp"):
        Client("ftp://example", settings=settings_at(tmp_path))
