"""`agentic-flow serve`: the services of this process as apps on their ports.

The platform is one door to everything: it carries the gateway, identity and agent definitions, and the
routes of runs and memory over its neighbours, wherever those run.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from agentic_flow.core.auth import LOCAL_OWNER, Authenticator
from agentic_flow.core.errors import InvalidInput
from agentic_flow.core.later import imported
from agentic_flow.core.readiness import ANSWER_TIMEOUT_S, Answering, Ready, all_of, room
from agentic_flow.core.serve import bind, check_host, serve
from agentic_flow.core.settings import Settings
from agentic_flow.core.web import OPENS_AFTER_S, create_app, json_response, require
from agentic_flow.core.web_floor import ErrorShape
from agentic_flow.runtime.build import SERVICES, Runtime, definition_catalog
from agentic_flow.runtime.deferred import DeferredRoutes

if TYPE_CHECKING:
    from agentic_flow.core.remote_auth import RemoteAuthenticator

_log: structlog.stdlib.BoundLogger = structlog.get_logger("agentic_flow.serve")
RUN_ROOTS = ("/v1/runs", "/v1/workflows", "/v1/schedules")
RUN_DOCUMENT_PATH = "/v1/runs/openapi.json"  # of swarm.routes, which is loaded when it is asked for
MEMORY_DOCUMENT_PATH = "/v1/memory/openapi.json"  # of memory.routes, which is loaded when it is asked for
MEMORY_ROOTS = ("/v1/namespaces", "/v1/namespace-stats", "/v1/tenants-with", "/v1/memory")


class _Face(NamedTuple):
    """What a service shows: routes, readiness, paths that need no credential, shapes of errors by path, and
    what it waits for before it is sent requests, where that is more than its readiness."""

    routes: list[BaseRoute]
    ready: Ready
    public: Collection[str] = ()
    error_shapes: Mapping[str, ErrorShape] = {}
    opens: Ready | None = None


async def serve_services(
    settings: Settings,
    names: Sequence[str],
    *,
    on_ready: Callable[[dict[str, str]], None] | None = None,
    on_owner_key: Callable[[str], None] | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve until a signal or `stop`; interrupted runs are taken over at the start and while it goes.

    Args:
        settings: The whole configuration.
        names: `all`, or services of SERVICES.
        on_ready: Called with service → base URL once every port answers.
        on_owner_key: Called with the owner's key when this start created it; it cannot be had again.
        stop: Set it to stop.

    Raises:
        InvalidInput: a name is no service.
        PortInUse: a port is taken; nothing was started and no key made.
        InvalidSettings: the address may not be bound as configured.
    """
    chosen = chosen_services(names)
    host = settings.serve.host
    ports = {name: int(getattr(settings.serve, f"{name}_port")) for name in chosen}
    for name, port in ports.items():
        # Asked before anything is opened, so that a refusal leaves no trace; `serve` binds them for good.
        check_host(name, host, auth_required=settings.auth.required)
        bind(name, host, port).close()
    async with Runtime(settings, serves=chosen) as runtime:
        made = _Apps(runtime, on_owner_key)
        apps = await made.build(chosen)
        if settings.serve.linger_s > 0 and made.remote is not None:
            # Beside one that it takes the place of: who is refused a connection goes there, and who is let
            # in is not turned away because nobody's key can be checked yet.
            await made.remote.wait_fresh(OPENS_AFTER_S)
        scheme = "https" if settings.tls.certificate_file else "http"

        def ready(addresses: list[tuple[str, int]]) -> None:
            if on_ready is not None:
                urls = [f"{scheme}://{f'[{at}]' if ':' in at else at}:{port}" for at, port in addresses]
                on_ready(dict(zip(chosen, urls, strict=True)))

        drain = asyncio.Event()
        draining = asyncio.create_task(_drained_after(drain, runtime))
        try:
            await serve(
                [(app, host, ports[name]) for name, app in apps.items()],
                tls=settings.tls,
                drain_timeout_s=settings.serve.drain_timeout_s,
                linger_s=settings.serve.linger_s,
                on_ready=ready,
                on_drain=drain.set,
                stop=stop,
            )
            await draining  # runs may take longer than requests
        finally:
            draining.cancel()
            await asyncio.wait([draining])


async def _drained_after(drain: asyncio.Event, runtime: Runtime) -> None:
    await drain.wait()
    left = await runtime.drain_runs()
    if left:
        _log.info("runs_handed_on", runs=left)


def chosen_services(names: Sequence[str]) -> tuple[str, ...]:
    """The services that `names` mean, in start order.

    Raises:
        InvalidInput: one of them is none.
    """
    for name in names:
        if name != "all" and name not in SERVICES:
            raise InvalidInput(
                f"{name!r} is not a service", hint=f"use all, or one or more of {', '.join(SERVICES)}"
            )
    return tuple(name for name in SERVICES if "all" in names or name in names)


class _Apps:
    """The apps of one process over one Runtime."""

    def __init__(self, runtime: Runtime, on_owner_key: Callable[[str], None] | None) -> None:
        self._runtime = runtime
        self._settings = runtime.settings
        self._on_owner_key = on_owner_key
        self.remote: RemoteAuthenticator | None = None
        """Who checks credentials where the platform runs elsewhere, once `build` was called."""

    async def build(self, names: Sequence[str]) -> dict[str, Starlette]:
        """Name → app."""
        authenticator, remote = await self._authenticator()
        makers = {"platform": self._platform, "agentdb": self._agentdb, "swarm": self._swarm}
        measured = "platform" if "platform" in names else "swarm"  # whose `/metrics` shows this process's
        disk = room(self._settings.data_dir, self._settings.serve.disk_free_min_bytes)
        apps: dict[str, Starlette] = {}
        for name in names:
            face = await makers[name]()
            ready = all_of(face.ready, disk) if remote is None else all_of(face.ready, _fresh(remote), disk)
            apps[name] = create_app(
                name,
                face.routes,
                authenticator=authenticator,
                settings=self._settings,
                ready=ready,
                opens=face.opens,
                metrics=self._runtime.metrics if name == measured else None,
                public_paths=face.public,
                error_shapes=face.error_shapes,
                # Entered once all ports are ours: a key that is shown once must not be lost to a taken port.
                lifespan=self._first_start if name == names[0] and remote is None else None,
            )
        return apps

    async def _authenticator(self) -> tuple[Authenticator, RemoteAuthenticator | None]:
        """Who checks credentials: the identity of this data folder, or the platform elsewhere."""
        url = self._runtime.peer_url("platform")
        if url is None:
            return await self._runtime.identity(), None
        from agentic_flow.core.remote_auth import RemoteAuthenticator

        settings = self._settings
        remote = RemoteAuthenticator(url, settings.auth, peers=settings.peers, tls=settings.tls)
        await self._runtime.enter(remote)
        self.remote = remote
        return remote, remote

    @asynccontextmanager
    async def _first_start(self, _: Starlette) -> AsyncGenerator[None]:
        key = await (await self._runtime.identity()).ensure_owner_key()
        if key is not None and self._on_owner_key is not None:
            self._on_owner_key(key)
        yield

    async def _platform(self) -> _Face:
        from agentic_flow.core.openapi import DOCUMENT_PATH
        from agentic_flow.gateway.budget_routes import build_budget_routes
        from agentic_flow.gateway.choice_routes import build_choice_routes
        from agentic_flow.gateway.front.errors import ERROR_SHAPES
        from agentic_flow.gateway.front.openai_embeddings import build_embedding_routes
        from agentic_flow.gateway.front.routes import build_front_routes
        from agentic_flow.gateway.policy_routes import build_policy_routes
        from agentic_flow.gateway.routes import build_routes as model_routes
        from agentic_flow.gateway.service import Gateway
        from agentic_flow.gateway.usage_routes import build_usage_routes
        from agentic_flow.runtime.identity_routes import PUBLIC_PATHS, identity_routes

        runtime = self._runtime
        if runtime.peer_url("swarm") is None:
            await runtime.watch_runs()
        else:
            await runtime.swarm()
        await runtime.memory_in_use()
        completer = await runtime.completer()
        assert isinstance(completer, Gateway), "the platform serves the gateway itself"
        kept = completer.stores
        assert kept is not None, "the platform keeps books"
        routes: list[BaseRoute] = [
            *model_routes(completer),
            *build_front_routes(completer),
            *build_choice_routes(completer),
            *build_embedding_routes(completer, await runtime.embedder()),
            *build_usage_routes(kept.usage),
            DeferredRoutes((DOCUMENT_PATH,), _model_document),
            *build_budget_routes(kept.budgets, lambda: kept.watch.policies.budgets),
            *build_policy_routes(kept.policies, kept.watch),
            DeferredRoutes(RUN_ROOTS, self._run_routes),
            DeferredRoutes(MEMORY_ROOTS, self._memory_routes),
            *_agent_routes(self._settings),
            *identity_routes(
                await runtime.identity(), erasers=await runtime.erasers(), survey=runtime.survey_backups
            ),
        ]
        public = PUBLIC_PATHS | {DOCUMENT_PATH, MEMORY_DOCUMENT_PATH, RUN_DOCUMENT_PATH}
        books = Answering("gateway database", lambda: asyncio.to_thread(kept.database.check))
        ready = all_of(books, self._peers_ready("agentdb", "swarm"))
        # Neighbours that have started beside it let nobody in before they have its keys and revocations.
        opens = self._peers_ready("agentdb", "swarm", path="/health/ready")
        return _Face(routes, ready, public, ERROR_SHAPES, opens)

    async def _run_routes(self) -> Sequence[BaseRoute]:
        await imported("agentic_flow.swarm.routes")
        from agentic_flow.swarm.routes import build_routes

        return build_routes(await self._runtime.swarm(takeover=True))

    async def _memory_routes(self) -> Sequence[BaseRoute]:
        await imported("agentic_flow.agentdb.routes", "agentic_flow.memory.routes")
        from agentic_flow.agentdb.routes import build_routes
        from agentic_flow.memory.routes import build_routes as learning_routes

        routes = build_routes(await self._runtime.store(), self._settings.agentdb)
        return [*learning_routes(await self._runtime.memory()), *routes]

    async def _agentdb(self) -> _Face:
        from agentic_flow.agentdb.routes import PUBLIC_PATHS, build_document_route, build_routes

        store = await self._runtime.store()

        ready = Answering("database", store.check)
        from agentic_flow.memory.routes import build_routes as learning_routes

        routes: list[BaseRoute] = [
            *build_routes(store, self._settings.agentdb),
            build_document_route(),
            *learning_routes(await self._runtime.memory()),
        ]
        return _Face(routes, ready, PUBLIC_PATHS | {MEMORY_DOCUMENT_PATH})

    async def _swarm(self) -> _Face:
        watch = await self._runtime.watch_runs()
        ready = all_of(Answering("run database", watch.works), self._peers_ready("platform", "agentdb"))
        return _Face([DeferredRoutes(RUN_ROOTS, self._run_routes)], ready, {RUN_DOCUMENT_PATH})

    def _peers_ready(self, *names: str, path: str = "/health/live") -> Ready:
        """Whether those neighbours that run elsewhere can be reached."""
        urls = {name: url for name in names if (url := self._runtime.peer_url(name)) is not None}
        if not urls:
            return all_of()
        from agentic_flow.core.http_twin import HttpTwin

        # A probe each time: a circuit that opens would go on saying for seconds that a neighbour is away.
        once = {"attempts": 1, "timeout_s": ANSWER_TIMEOUT_S, "breaker_failures": sys.maxsize}
        peers = self._settings.peers.model_copy(update=once)
        twins = {name: HttpTwin(url, peers, tls=self._settings.tls, peer=name) for name, url in urls.items()}
        for twin in twins.values():
            self._runtime.on_exit(twin.close)

        def asked(twin: HttpTwin) -> Callable[[], Awaitable[object]]:
            return lambda: twin.call("GET", path, principal=LOCAL_OWNER)

        return all_of(*(Answering(name, asked(twin)) for name, twin in twins.items()))


async def _model_document() -> Sequence[BaseRoute]:
    await imported("agentic_flow.gateway.openapi")
    from agentic_flow.gateway.openapi import build_document_route

    return [await asyncio.to_thread(build_document_route)]


def _agent_routes(settings: Settings) -> list[Route]:
    """GET /v1/agents and /v1/agents/{name}: the definitions as they are on disk now."""

    async def list_agents(request: Request) -> Response:
        require(request, "agents:read")
        catalog = await asyncio.to_thread(definition_catalog, settings)
        agents = [agent.model_dump(mode="json", exclude={"prompt"}) for agent in catalog.list()]
        return json_response({"agents": agents, "problems": [str(problem) for problem in catalog.problems]})

    async def show(request: Request) -> Response:
        require(request, "agents:read")
        catalog = await asyncio.to_thread(definition_catalog, settings)
        return json_response(catalog.get(str(request.path_params["name"])))

    return [Route("/v1/agents", list_agents), Route("/v1/agents/{name}", show)]


def _fresh(remote: RemoteAuthenticator) -> Ready:
    async def ready() -> dict[str, bool]:
        return {"revocations": remote.fresh}

    return ready
