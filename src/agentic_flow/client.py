"""The Python API: `AsyncClient`, and `Client`, which runs it on a thread of its own.

Without a URL the services live in this process over the data folder, as in `agentic-flow run`. With a URL
they live in a server (`agentic-flow serve`), and the same methods go over HTTP.

    async with AsyncClient() as client:
        result = await client.run("How does a task get cancelled?", input="src")
        print(result.answer)

Closing an embedded client lets go of runs that it did not see to the end; they are kept as `interrupted` and
can be resumed. Cancelling (or Ctrl-C in) a call of `run` cancels the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args

from anyio import move_on_after
from pydantic import ValidationError

from agentic_flow.core.errors import Conflict, InvalidInput, PathNotFound

if TYPE_CHECKING:
    from agentic_flow.core.auth import Principal
    from agentic_flow.core.messages import ModelInfo
    from agentic_flow.core.ports import RunState
    from agentic_flow.core.settings import Settings
    from agentic_flow.core.vectors import SearchResult
    from agentic_flow.memory.answers import LearnReport, MemoryService
    from agentic_flow.memory.bound import BoundMemory, WaitedMemory
    from agentic_flow.runtime.build import Runtime
    from agentic_flow.swarm.questions import Question
    from agentic_flow.swarm.runs import (
        Artifact,
        ArtifactContent,
        Purged,
        RunEvent,
        RunResult,
        RunService,
        RunSpec,
        RunStep,
    )
    from agentic_flow.swarm.schedule_bound import BoundSchedules, WaitedSchedules
    from agentic_flow.swarm.schedules import ScheduleService
    from agentic_flow.swarm.tries import SeveralTries
    from agentic_flow.swarm.workflow_bound import BoundWorkflows, WaitedWorkflows

T = TypeVar("T")
Inputs = str | Path | Sequence[str | Path] | None
OnEvent = Callable[["RunEvent"], None]

_CANCEL_TIMEOUT_S = 10.0


class AsyncClient:
    """Runs teams of agents, here or on a server. Use it with `async with`, or call `close`.

    Args:
        url: Base URL of the platform service; None runs everything in this process.
        token: API key for the server.
        data_dir: Folder of all local state; the configured one by default. Not with a URL.
        settings: Complete settings instead of those that environment and files give.

    Raises:
        InvalidSettings: a setting is unknown or malformed.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        data_dir: str | Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        if settings is None:
            from agentic_flow.core.settings import load

            settings = load({"data_dir": data_dir}).settings
        elif data_dir is not None:
            settings = settings.model_copy(update={"data_dir": Path(data_dir)})
        if url is not None:
            settings = _remote(settings, url, token)
        _quiet_logs()
        self.settings = settings
        self.runs = AsyncRuns(self)
        self._runtime: Runtime | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of everything; idempotent."""
        await self._stack.aclose()
        self._runtime = None

    async def run(
        self,
        goal: str,
        *,
        input: Inputs = None,
        topology: str | None = None,
        agents: int | None = None,
        model: str | None = None,
        budget_usd: float | None = None,
        paths_allowed: Sequence[str] = (),
        paths_forbidden: Sequence[str] = (),
        memory: bool = True,
        on_event: OnEvent | None = None,
        **more: Any,
    ) -> RunResult:
        """Run a team to its end and return what it found; a run that failed is returned, not raised.

        Args:
            goal: The question or task.
            input: A file or folder, or several, that the team works on.
            topology: adaptive, hierarchical, mesh, pipeline, ring, star or a plug-in's; the configured one
                by default.
            agents: Worker agents, 1 to 64; the configured number by default.
            model: `provider:model` or a bare name; the configured default by default.
            budget_usd: Hard limit on the money spent.
            paths_allowed: gitignore-style patterns relative to the input; empty allows all.
            paths_forbidden: Likewise; they win.
            memory: Whether the agents are told what earlier runs taught.
            on_event: Called with each event as it happens.
            more: Other fields of `swarm.runs.RunSpec` by name: `teams`, `reviewers`, `roles`, ….

        Raises:
            InvalidInput: an argument is wrong; PathNotFound, UnknownModel among them.
        """
        run_id = await self.runs.submit(
            goal,
            input=input,
            topology=topology,
            agents=agents,
            model=model,
            budget_usd=budget_usd,
            paths_allowed=paths_allowed,
            paths_forbidden=paths_forbidden,
            memory=memory,
            **more,
        )
        try:
            if on_event is not None:
                async for event in self.runs.events(run_id):
                    on_event(event)
            return await self.runs.wait(run_id)
        except asyncio.CancelledError:
            # Nobody waits for the answer any more: do not spend money on it.
            with move_on_after(_CANCEL_TIMEOUT_S, shield=True):
                await self.runs.cancel(run_id)
            raise

    @property
    def learns_here(self) -> bool:
        """Whether nobody but this process would learn from its runs: no server has its part in them."""
        peers = self.settings.peers
        return peers.platform_url is None and peers.swarm_url is None

    async def learn(self, *, timeout_s: float = 60.0) -> LearnReport:
        """Learn now from the runs that wait for it, for at most `timeout_s` seconds."""
        runtime = await self._open()
        return await (await runtime.memory()).learn(runtime.principal, timeout_s=timeout_s)

    @functools.cached_property
    def memory(self) -> BoundMemory:
        """What agents learned: recall, record, verdicts, items, skills, episodes; see MemoryService."""
        from agentic_flow.memory.bound import BoundMemory

        async def opened() -> tuple[MemoryService, Principal]:
            runtime = await self._open()
            return await runtime.memory(), runtime.principal

        return BoundMemory(opened)

    @functools.cached_property
    def workflows(self) -> BoundWorkflows:
        """Workflow files: validate, submit, run."""
        from agentic_flow.swarm.workflow_bound import BoundWorkflows

        async def opened() -> tuple[RunService, Principal]:
            runtime, swarm = await self._swarm()
            return swarm, runtime.principal

        return BoundWorkflows(opened)

    @functools.cached_property
    def schedules(self) -> BoundSchedules:
        """Workflow files that run by themselves: add, list, show, pause, resume, remove."""
        from agentic_flow.swarm.schedule_bound import BoundSchedules

        async def opened() -> tuple[ScheduleService, Principal]:
            runtime, swarm = await self._swarm()
            return swarm.schedules, runtime.principal

        async def looked_at() -> tuple[ScheduleService, Principal]:
            runtime, runs = await self._records()
            return runs.schedules, runtime.principal

        return BoundSchedules(opened, looked_at)

    async def matts(self, goal: str, *, k: int = 3, sequential: bool = False, **options: Any) -> SeveralTries:
        """Run a goal several times, compare the runs, and keep what that teaches.

        Args:
            goal: The question or task.
            k: Runs at the same time; with `sequential`, one after the other until one succeeds, at most.
            sequential: Each run is told how the earlier ones went.
            options: As in `run`, for each of them; a budget is for each.

        Raises:
            InvalidInput: an argument is wrong.
            Unavailable: memory does not learn where it is asked.
        """
        from agentic_flow.swarm.tries import try_several

        runtime, swarm = await self._swarm()
        spec = self.runs.spec(goal, **options)
        memory = await runtime.memory()
        return await try_several(swarm, memory, runtime.principal, spec, k=k, sequential=sequential)

    async def models(self) -> list[ModelInfo]:
        """The models that can be asked now, the default one first."""
        runtime = await self._open()
        return await (await runtime.completer()).models(principal=runtime.principal)

    async def search(
        self,
        query: str,
        *,
        input: Inputs = None,
        namespace: str | None = None,
        k: int = 10,
    ) -> SearchResult:
        """Passages of memory that match a query, best first.

        Args:
            query: Words or a question.
            input: Search what runs over this same input have read in.
            namespace: Or name the namespace.
            k: Most passages returned, 1 to 1000.

        Raises:
            NotFound: nothing was read in under that input or name.
        """
        from agentic_flow.core.vectors import SearchQuery
        from agentic_flow.swarm.inputs import Folder
        from agentic_flow.swarm.runs import RunSpec

        if (input is None) == (namespace is None):
            raise InvalidInput("search needs either an input or a namespace", hint="give exactly one of them")
        if namespace is None:
            spec = RunSpec(goal="search", inputs=absolute(input))
            namespace = (await asyncio.to_thread(Folder.of, spec)).namespace
        wanted = validated(SearchQuery, {"text": query, "k": k})
        runtime = await self._open()
        store = await runtime.store()
        return await store.search(runtime.principal.tenant, namespace, wanted)

    async def _open(self) -> Runtime:
        if self._runtime is None:
            from agentic_flow.runtime.build import Runtime

            self._runtime = await self._stack.enter_async_context(Runtime(self.settings))
        return self._runtime

    async def _swarm(self) -> tuple[Runtime, RunService]:
        """The coordinator at work."""
        runtime = await self._open()
        return runtime, await runtime.swarm()

    async def _records(self) -> tuple[Runtime, RunService]:
        """Runs to look at, without starting anything."""
        runtime = await self._open()
        return runtime, await runtime.runs()


class AsyncRuns:
    """Runs one by one: `client.runs`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def submit(
        self,
        goal: str,
        *,
        input: Inputs = None,
        topology: str | None = None,
        agents: int | None = None,
        model: str | None = None,
        budget_usd: float | None = None,
        paths_allowed: Sequence[str] = (),
        paths_forbidden: Sequence[str] = (),
        memory: bool = True,
        refines: Sequence[str] = (),
        idempotency_key: str | None = None,
        detached: bool = False,
        **more: Any,
    ) -> str:
        """Accept a run durably and return its id at once; arguments as in `AsyncClient.run`.

        Args:
            refines: Earlier runs of this goal, of which the team is told how they went.
            idempotency_key: The same key and arguments give the same run, however often they are sent.
            detached: Another process is to do it: a client without a server puts it into a shared queue, by
                default `default`.

        Raises:
            Unavailable: detached, and no process that lives takes runs from the queue.
        """
        spec = self.spec(
            goal,
            input=input,
            topology=topology,
            agents=agents,
            model=model,
            budget_usd=budget_usd,
            paths_allowed=paths_allowed,
            paths_forbidden=paths_forbidden,
            memory=memory,
            refines=refines,
            **more,
        )
        runtime, swarm = await self._client._swarm()  # pyright: ignore[reportPrivateUsage]
        if detached:
            from agentic_flow.swarm.service import Swarm

            if isinstance(swarm, Swarm):  # else the server that is asked does it, or knows who does
                spec = spec.model_copy(update={"queue": await swarm.queue_of_detached(spec.queue)})
        return await swarm.submit(runtime.principal, spec, idempotency_key=idempotency_key)

    def spec(
        self,
        goal: str,
        *,
        input: Inputs = None,
        topology: str | None = None,
        agents: int | None = None,
        model: str | None = None,
        budget_usd: float | None = None,
        paths_allowed: Sequence[str] = (),
        paths_forbidden: Sequence[str] = (),
        memory: bool = True,
        refines: Sequence[str] = (),
        **more: Any,
    ) -> RunSpec:
        """What a run is asked, with the configured defaults; arguments as in `submit`."""
        from agentic_flow.swarm.runs import RunSpec

        chosen = self._client.settings.swarm
        return validated(
            RunSpec,
            {
                "goal": goal,
                "inputs": absolute(input, here=self._client.settings.peers.swarm_url is None),
                "topology": topology or chosen.topology,
                "agents": chosen.agents_max if agents is None else agents,
                "model": model,
                "budget_usd": budget_usd,
                "paths_allowed": tuple(paths_allowed),
                "paths_forbidden": tuple(paths_forbidden),
                "memory": memory,
                "refines": tuple(refines),
                **more,
            },
        )

    async def wait(self, run_id: str) -> RunResult:
        """The run's result, once it has ended."""
        runtime, swarm = await self._client._swarm()  # pyright: ignore[reportPrivateUsage]
        return await swarm.wait(runtime.principal, run_id)

    async def show(self, run_id: str) -> RunResult:
        """The run as it stands."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.show(runtime.principal, run_id)

    async def list(self, *, states: Sequence[RunState] = (), limit: int = 50) -> list[RunResult]:
        """Runs, newest first; `states` empty means all."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.list_runs(runtime.principal, states=states, limit=limit)

    async def steps(self, run_id: str) -> Sequence[RunStep]:
        """Every recorded step of the run and its agents, in order of completion."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.steps(runtime.principal, run_id)

    async def artifacts(self, run_id: str, *, versions: bool = False) -> Sequence[Artifact]:
        """What the run has left so far, by name; with `versions` every version, in order of storing."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.artifacts(runtime.principal, run_id, versions=versions)

    async def artifact(self, run_id: str, name: str, *, version: int | None = None) -> ArtifactContent:
        """One of them, with its bytes (`.data`, `.text`); without `version` the newest.

        Raises:
            NotFound: there is no such run, name or version.
        """
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.artifact(runtime.principal, run_id, name, version=version)

    async def picture(self, run_id: str) -> str:
        """An SVG of the run: its message graph, and the timeline of its agents with tokens and cost."""
        from agentic_flow.swarm.picture import picture

        return picture(await self.show(run_id), await self.steps(run_id))

    async def questions(self, run_id: str) -> Sequence[Question]:
        """What the run has asked people, answered or not."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.questions(runtime.principal, run_id)

    async def answer(self, run_id: str, question_id: str, answer: str) -> bool:
        """Answer a question of a run, wherever it waits; False when it has this answer already.

        Raises:
            NotFound: no such question was asked.
            InvalidInput: the answer is none of its options.
            Conflict: it has another answer, or waits for none any more.
        """
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.answer(runtime.principal, run_id, question_id, answer)

    async def resume(self, run_id: str) -> RunResult:
        """Continue a paused, interrupted or cancelled run where it was, and wait for its end.

        Raises:
            Conflict: it has ended already, or another process is working on it.
        """
        await self.restart(run_id)
        return await self.wait(run_id)

    async def restart(self, run_id: str) -> None:
        """Continue a paused, interrupted or cancelled run without waiting for it; raises like `resume`."""
        runtime, swarm = await self._client._swarm()  # pyright: ignore[reportPrivateUsage]
        if not await swarm.resume(runtime.principal, run_id):
            state = (await swarm.show(runtime.principal, run_id)).state
            raise Conflict(
                f"run {run_id!r} is {state} and cannot be resumed",
                hint="only paused, interrupted and cancelled runs can; `runs show` prints what it left",
            )

    async def pause(self, run_id: str) -> bool:
        """Hold a run before its next steps until it is resumed; False when it has ended or is paused."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.pause(runtime.principal, run_id)

    async def cancel(self, run_id: str) -> bool:
        """Cancel a run and its agents; False when it had already ended."""
        runtime, swarm = await self._client._swarm()  # pyright: ignore[reportPrivateUsage]
        return await swarm.cancel(runtime.principal, run_id)

    async def signal(self, run_id: str, name: str, value: Any = None, *, key: str | None = None) -> bool:
        """Send a run a signal, wherever it waits for it; False when it has one with this key already.

        Args:
            run_id: The run.
            name: What steps wait for: `wait_for: {signal: NAME}`.
            value: Any JSON value.
            key: Its own among the signals of the name; None: this call's.

        Raises:
            NotFound: there is no such run.
            Conflict: it has ended, or has another signal with this key.
        """
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.signal(runtime.principal, run_id, name, value, key=key)

    async def retry(
        self, run_id: str, *, from_step: str | None = None, idempotency_key: str | None = None
    ) -> str:
        """Start a new run that takes over an ended one's recorded steps before `from_step`; its id.

        The rest is done again, from the first step that did not complete if none is named. Budget, tokens and
        deadline count anew; `show(id).retry_of` names the old run.

        Raises:
            NotFound: no such run, or no such step in it; the hint names those there are.
            Conflict: it has not ended, or none of its steps failed and none is named.
        """
        runtime, swarm = await self._client._swarm()  # pyright: ignore[reportPrivateUsage]
        return await swarm.retry(
            runtime.principal, run_id, from_step=from_step, idempotency_key=idempotency_key
        )

    async def purge(
        self,
        *,
        older_than_s: float | None = None,
        keep_bytes: int | None = None,
        tenant: str | None = None,
        dry_run: bool = False,
    ) -> Purged:
        """Remove runs that have ended, with everything stored of them. There is no way back.

        Args:
            older_than_s: Those that ended so many seconds ago.
            keep_bytes: The oldest, so that the rest of the tenant's takes no more. Without both: what
                `swarm.keep_days` and `swarm.keep_bytes` say.
            tenant: Whose; None: one's own.
            dry_run: Only tell what would go.

        Raises:
            InvalidInput: nothing says which.
            Forbidden: another tenant's are for administrators.
        """
        from agentic_flow.swarm.runs import PurgeRequest

        asked = {
            "older_than_s": older_than_s,
            "keep_bytes": keep_bytes,
            "tenant": tenant,
            "dry_run": dry_run,
        }
        request = validated(PurgeRequest, asked)
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        return await runs.purge(runtime.principal, request)

    async def events(self, run_id: str, *, after: int = 0) -> AsyncIterator[RunEvent]:
        """What happened since event `after`, then what happens, until the run has ended. Starts nothing."""
        runtime, runs = await self._client._records()  # pyright: ignore[reportPrivateUsage]
        async for event in runs.events(runtime.principal, run_id, after=after):
            yield event


class Client:
    """`AsyncClient` for code without an event loop: it runs one on a thread of its own.

    Takes the same arguments. Use it with `with`, or call `close`. Safe to call from several threads.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        data_dir: str | Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._async = AsyncClient(url, token=token, data_dir=data_dir, settings=settings)
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        # A daemon: a script that forgets to close its client ends all the same, and its run can be resumed.
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="agentic-flow-client", daemon=True
        )
        self._thread.start()
        self.runs = Runs(self, self._async.runs)

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._async.settings

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything; idempotent."""
        if self._loop is not None:
            try:
                self._call(self._async.close)
                self._call(self._loop.shutdown_default_executor)
            finally:
                loop, self._loop = self._loop, None
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join()
                loop.close()

    def run(
        self,
        goal: str,
        *,
        input: Inputs = None,
        topology: str | None = None,
        agents: int | None = None,
        model: str | None = None,
        budget_usd: float | None = None,
        paths_allowed: Sequence[str] = (),
        paths_forbidden: Sequence[str] = (),
        memory: bool = True,
        on_event: OnEvent | None = None,
        **more: Any,
    ) -> RunResult:
        """See `AsyncClient.run`; `on_event` is called on the loop's thread."""
        return self._call(
            lambda: self._async.run(
                goal,
                input=input,
                topology=topology,
                agents=agents,
                model=model,
                budget_usd=budget_usd,
                paths_allowed=paths_allowed,
                paths_forbidden=paths_forbidden,
                memory=memory,
                on_event=on_event,
                **more,
            )
        )

    @functools.cached_property
    def memory(self) -> WaitedMemory:
        """See `AsyncClient.memory`."""
        from agentic_flow.memory.bound import WaitedMemory

        return WaitedMemory(self._async.memory, self._call)

    @functools.cached_property
    def schedules(self) -> WaitedSchedules:
        """See `AsyncClient.schedules`."""
        from agentic_flow.swarm.schedule_bound import WaitedSchedules

        return WaitedSchedules(self._async.schedules, self._call)

    @functools.cached_property
    def workflows(self) -> WaitedWorkflows:
        """See `AsyncClient.workflows`."""
        from agentic_flow.swarm.workflow_bound import WaitedWorkflows

        return WaitedWorkflows(self._async.workflows, self._call)

    def learn(self, *, timeout_s: float = 60.0) -> LearnReport:
        """See `AsyncClient.learn`."""
        return self._call(lambda: self._async.learn(timeout_s=timeout_s))

    def matts(self, goal: str, *, k: int = 3, sequential: bool = False, **options: Any) -> SeveralTries:
        """See `AsyncClient.matts`."""
        return self._call(lambda: self._async.matts(goal, k=k, sequential=sequential, **options))

    def models(self) -> list[ModelInfo]:
        """See `AsyncClient.models`."""
        return self._call(self._async.models)

    def search(
        self,
        query: str,
        *,
        input: Inputs = None,
        namespace: str | None = None,
        k: int = 10,
    ) -> SearchResult:
        """See `AsyncClient.search`."""
        return self._call(lambda: self._async.search(query, input=input, namespace=namespace, k=k))

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if self._loop is None:
            raise Conflict("this client is closed", hint="make a new one")
        ended = threading.Event()

        async def call() -> T:
            try:
                return await function()
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C reaches this thread, not the loop's: carry it over, and let the call clean up first.
            if future.cancel():
                ended.wait(2 * _CANCEL_TIMEOUT_S)
            raise


class Runs:
    """Runs one by one: `client.runs`. Each method is that of `AsyncRuns`, waited for."""

    def __init__(self, client: Client, runs: AsyncRuns) -> None:
        self._call = client._call  # pyright: ignore[reportPrivateUsage]
        self._runs = runs

    def submit(self, goal: str, **options: Any) -> str:
        """See `AsyncRuns.submit`."""
        return self._call(lambda: self._runs.submit(goal, **options))

    def wait(self, run_id: str) -> RunResult:
        """See `AsyncRuns.wait`."""
        return self._call(lambda: self._runs.wait(run_id))

    def show(self, run_id: str) -> RunResult:
        """See `AsyncRuns.show`."""
        return self._call(lambda: self._runs.show(run_id))

    def list(self, *, states: Sequence[RunState] = (), limit: int = 50) -> list[RunResult]:
        """See `AsyncRuns.list`."""
        return self._call(lambda: self._runs.list(states=states, limit=limit))

    def steps(self, run_id: str) -> Sequence[RunStep]:
        """See `AsyncRuns.steps`."""
        return self._call(lambda: self._runs.steps(run_id))

    def artifacts(self, run_id: str, *, versions: bool = False) -> Sequence[Artifact]:
        """See `AsyncRuns.artifacts`."""
        return self._call(lambda: self._runs.artifacts(run_id, versions=versions))

    def artifact(self, run_id: str, name: str, *, version: int | None = None) -> ArtifactContent:
        """See `AsyncRuns.artifact`."""
        return self._call(lambda: self._runs.artifact(run_id, name, version=version))

    def picture(self, run_id: str) -> str:
        """See `AsyncRuns.picture`."""
        return self._call(lambda: self._runs.picture(run_id))

    def questions(self, run_id: str) -> Sequence[Question]:
        """See `AsyncRuns.questions`."""
        return self._call(lambda: self._runs.questions(run_id))

    def answer(self, run_id: str, question_id: str, answer: str) -> bool:
        """See `AsyncRuns.answer`."""
        return self._call(lambda: self._runs.answer(run_id, question_id, answer))

    def resume(self, run_id: str) -> RunResult:
        """See `AsyncRuns.resume`."""
        return self._call(lambda: self._runs.resume(run_id))

    def pause(self, run_id: str) -> bool:
        """See `AsyncRuns.pause`."""
        return self._call(lambda: self._runs.pause(run_id))

    def cancel(self, run_id: str) -> bool:
        """See `AsyncRuns.cancel`."""
        return self._call(lambda: self._runs.cancel(run_id))

    def signal(self, run_id: str, name: str, value: Any = None, *, key: str | None = None) -> bool:
        """See `AsyncRuns.signal`."""
        return self._call(lambda: self._runs.signal(run_id, name, value, key=key))

    def retry(self, run_id: str, **options: Any) -> str:
        """See `AsyncRuns.retry`."""
        return self._call(lambda: self._runs.retry(run_id, **options))

    def purge(self, **options: Any) -> Purged:
        """See `AsyncRuns.purge`."""
        return self._call(lambda: self._runs.purge(**options))


def _quiet_logs() -> None:
    """Where nobody has set up structlog, its default would print our debug lines on standard output."""
    import structlog

    if not structlog.is_configured():
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )


def absolute(inputs: Inputs, *, here: bool = True) -> tuple[str, ...]:
    """Inputs as absolute paths, `~` expanded.

    Args:
        here: Whether they are read on this machine. A coordinator elsewhere may have folders that this one
            has not, under absolute paths; it says itself when there is none.

    Raises:
        PathNotFound: one of them does not exist.
    """
    if inputs is None:
        return ()
    given = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    paths = [Path(item).expanduser().absolute() for item in given]
    for item, path in zip(given, paths, strict=True):
        if not path.exists() and (here or not Path(item).is_absolute()):
            raise PathNotFound(f"input {str(item)!r} does not exist", hint="name an existing file or folder")
    return tuple(map(str, paths))


def known_states(words: Sequence[str]) -> tuple[RunState, ...]:
    """States of runs from a caller's words.

    Raises:
        InvalidInput: one of them is none.
    """
    from agentic_flow.core.ports import RunState

    states = get_args(RunState)
    for word in words:
        if word not in states:
            raise InvalidInput(f"{word!r} is not a state of runs", hint=f"use one of {', '.join(states)}")
    return cast("tuple[RunState, ...]", tuple(words))


def validated(kind: type[T], values: dict[str, Any]) -> T:
    """A value object from a caller's words.

    Raises:
        InvalidInput: names the first word that is wrong, and why.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else kind.__name__
        raise InvalidInput(
            f"{name} {_short(values.get(name))} is refused: {first['msg'][:1].lower()}{first['msg'][1:]}",
            hint=f"give another value for {name}",
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _remote(settings: Settings, url: str, token: str | None) -> Settings:
    """The same settings with every neighbour behind one platform URL."""
    from pydantic import SecretStr

    if not url.startswith(("http://", "https://")):
        raise InvalidInput(f"url {url!r} is no HTTP address", hint="write it like 'http://127.0.0.1:3000'")
    root = url.rstrip("/")
    changes: dict[str, Any] = {"platform_url": root, "agentdb_url": root, "swarm_url": root}
    if token is not None:
        changes["token"] = SecretStr(token)
    return settings.model_copy(update={"peers": settings.peers.model_copy(update=changes)})
