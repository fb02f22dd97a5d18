"""The composition root: makes each service, or its HTTP twin when it runs elsewhere.

Which of the two is decided by `peers.NAME_url` (and by what this process serves itself); whoever uses a
service sees its Protocol. Everything is imported and made when it is first asked for, so that `models list`
does not pay for the run engine.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar

from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from agentic_flow.core import plugins
from agentic_flow.core.auth import LOCAL_OWNER, Principal, TokenSource
from agentic_flow.core.errors import Unauthenticated
from agentic_flow.core.later import imported
from agentic_flow.core.ports import Completer, Embedder, ToolBox, VectorStore
from agentic_flow.core.secrets import SecretSource, SecretStore, StoredSecret, resolve
from agentic_flow.core.settings import PeerSettings, Settings, TlsSettings, secret_names

if TYPE_CHECKING:
    from agentic_flow.agentdb.erasure import BackupSurvey
    from agentic_flow.memory.answers import MemoryService
    from agentic_flow.memory.records import Trajectory, Verdict
    from agentic_flow.memory.service import Memory
    from agentic_flow.runtime.deferred import RunWatch
    from agentic_flow.runtime.identity import Identity
    from agentic_flow.swarm.definitions import DefinitionCatalog
    from agentic_flow.swarm.runs import RunService
    from agentic_flow.swarm.service import Swarm
    from agentic_flow.tools.audit import AuditLog

T = TypeVar("T")

SERVICES = ("platform", "agentdb", "swarm")
AUDIT_FILE = "audit.db"
IDENTITY_FILE = "identity.db"
MEMORY_FOLDER = "agentdb"
TOOL_MODULES = (
    "agentic_flow.tools.files",
    "agentic_flow.tools.policy",
    "agentic_flow.tools.shell",
    "agentic_flow.tools.toolbox",
)
PROVIDER_KEY = re.compile(r"gateway\.[a-z0-9_]+\.api_key")


class Runtime:
    """The services of one process. Use it with `async with`; whatever was made is closed on the way out.

    Args:
        settings: The whole configuration; each service gets its own section.
        serves: Names of the services that this process offers to others. None offered: it is a client,
            and calls to neighbours carry its own key.
        completer: What answers model calls, in place of the gateway.
    """

    def __init__(
        self, settings: Settings, *, serves: Collection[str] = (), completer: Completer | None = None
    ) -> None:
        self.settings = with_stored_secrets(settings)
        self.principal: Principal = LOCAL_OWNER
        self.metrics = CollectorRegistry()
        """Metrics of the services that this process runs, beside those of its web floors."""
        self._serves = frozenset(serves)
        self._stack = AsyncExitStack()
        self._made: dict[str, Any] = {} if completer is None else {"completer": completer}
        self._locks: dict[str, asyncio.Lock] = {}
        self._watch: RunWatch | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is not None:
            await self._watch.close()  # before the rest: it must put nothing to work that is being closed
        await self._stack.aclose()

    # What callers ask for

    async def completer(self) -> Completer:
        """Model calls: the gateway, or its twin."""
        return await self._once("completer", self._make_completer)

    async def store(self) -> VectorStore:
        """The vector database: AgentDB, or its twin."""
        return await self._once("store", self._make_store)

    async def memory(self) -> MemoryService:
        """What agents learn, over the store; or, for a client of a platform, its twin."""
        return await self._once("memory", self._make_memory)

    async def embedder(self) -> Embedder:
        """What makes vectors of texts, by `agentdb.embedder`."""
        return await self._once("embedder", self._make_embedder)

    async def swarm(self, *, takeover: bool = False) -> RunService:
        """Runs: the coordinator at work, or its twin.

        Args:
            takeover: Continue interrupted runs, now and whenever one appears. Decided by the first call.
        """
        return await self._once("swarm", lambda: self._open_swarm(takeover))

    async def worker(self) -> Swarm:
        """The coordinator of this process, at work for the shared queues of `swarm.queues`."""
        from agentic_flow.swarm.service import Swarm

        runs = await self.swarm(takeover=True)
        assert isinstance(runs, Swarm), "a worker serves runs itself"
        return runs

    async def drain_runs(self) -> int:
        """Take no more runs, finish those at work here for `swarm.drain_s`; how many are left to others.

        What is left goes on elsewhere as soon as this runtime is closed.
        """
        if self._watch is not None:
            await self._watch.close()
        runs = self._made.get("swarm")
        if runs is None:
            return 0  # and nothing of runs is loaded for that
        from agentic_flow.swarm.service import Swarm

        return await runs.drain(self.settings.swarm.drain_s) if isinstance(runs, Swarm) else 0

    async def watch_runs(self) -> RunWatch:
        """Continue interrupted runs, now and whenever one appears. Until there is one, or a caller asks for
        `swarm`, no run engine is made.

        Raises:
            AgenticFlowError: the run database, or what runs were made with here before, cannot be used.
        """
        return await self._once("watch", self._make_watch)

    async def memory_in_use(self) -> None:
        """Open memory that is there already, or configured, so that what is wrong with it is said now.

        One that was never used is made when it first is.
        """
        own = self.settings.agentdb
        configured = own.database_url or own.history_dir or self.peer_url("agentdb")
        if configured or (self.settings.data_dir / MEMORY_FOLDER).exists():
            await self.store()

    async def runs(self) -> RunService:
        """The same runs to look at; nothing is started for it."""
        return await self._once("runs", self._make_runs)

    async def toolbox(self) -> ToolBox:
        """Tool calls of agents; always in this process, because files are."""
        return await self._once("toolbox", self._make_toolbox)

    async def identity(self) -> Identity:
        """Tenants and keys of this data folder."""
        return await self._once("identity", self._make_identity)

    async def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enter something that is to end with this runtime, before what was made earlier."""
        return await self._stack.enter_async_context(context)

    def on_exit(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call this when the runtime ends."""
        self._stack.push_async_callback(callback)

    def peer_url(self, service: str) -> str | None:
        """Where a neighbour runs, or None when it runs in this process."""
        if service in self._serves:
            return None
        url: str | None = getattr(self.settings.peers, f"{service}_url")
        return url

    # How it is made

    async def _once(self, name: str, make: Callable[[], Awaitable[T]]) -> T:
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name not in self._made:
                self._made[name] = await make()
        return self._made[name]

    async def _make_completer(self) -> Completer:
        url = self.peer_url("platform")
        if url is not None:
            from agentic_flow.gateway.remote import RemoteGateway

            remote = RemoteGateway(url, **await self._calls("platform"))
            await self._stack.enter_async_context(remote)
            return remote
        from agentic_flow.gateway.metrics import GatewayMetrics
        from agentic_flow.gateway.service import Gateway
        from agentic_flow.gateway.stores import GatewayStores

        gateway = Gateway(
            self.settings.gateway,
            extra_providers=plugins.load_all("agentic_flow.providers"),
            stores=GatewayStores(self.settings.gateway, self.settings.data_dir),
            metrics=GatewayMetrics(self.metrics),
            extra_checkers=plugins.load_all("agentic_flow.checkers"),
            extra_guardrails=plugins.load_all("agentic_flow.guardrails"),
            stored_secrets=stored_secrets(self.settings.data_dir),
            embedder=await self.embedder(),
        )
        await self._stack.enter_async_context(gateway)
        if "platform" in self._serves:
            await gateway.open()  # what is wrong with its database is said at the start
        return gateway

    async def _make_store(self) -> VectorStore:
        url = self.peer_url("agentdb")
        if url is not None:
            from agentic_flow.agentdb.remote import RemoteAgentDB

            return await self._stack.enter_async_context(RemoteAgentDB(url, **await self._calls("agentdb")))
        settings = self.settings.agentdb
        embedder = await self.embedder()
        if settings.database_url is not None:
            from agentic_flow.agentdb.postgres.store import PostgresAgentDB

            database_url = settings.database_url.get_secret_value()
            return await self._stack.enter_async_context(
                PostgresAgentDB(database_url, settings, embedder, create=True)
            )
        await imported("agentic_flow.agentdb.service")
        from agentic_flow.agentdb.service import AgentDB

        opened = await asyncio.to_thread(AgentDB, self.settings.data_dir, settings, embedder)
        return await self._stack.enter_async_context(opened)

    async def _make_memory(self) -> MemoryService:
        url = self.peer_url("platform")
        if url is not None and not self._serves:
            from agentic_flow.memory.remote import RemoteMemory

            return await self._stack.enter_async_context(RemoteMemory(url, **await self._calls("platform")))
        from agentic_flow.memory.service import Memory

        memory = Memory(await self.store(), self.settings.memory)
        if not self._serves or self._serves & {"platform", "swarm"}:
            # A database by itself keeps no models: who runs agents learns from what they did.
            await self._add_learner(memory)
        return memory

    async def _add_learner(self, memory: Memory) -> None:
        from agentic_flow.memory.distill import Distiller
        from agentic_flow.memory.episodes import Episodes
        from agentic_flow.memory.judge import Judge
        from agentic_flow.memory.learning import Learner

        own, store, completer = self.settings.memory, await self.store(), await self.completer()
        episodes = Episodes(store, completer, model=own.judge_model, retention_days=own.retention_days)

        async def learn_skill(principal: Principal, trajectory: Trajectory, verdict: Verdict) -> None:
            await memory.skills.learn(principal.tenant, trajectory, verdict)

        judge = Judge(completer, model=own.judge_model)
        learner = Learner(
            memory.records,
            memory.bank,
            judge,
            Distiller(completer, model=own.judge_model),
            own,
            after=(memory.note_outcome, memory.rate_skills, learn_skill, episodes.reflect),
            expiring=(memory.recalls,),
            shown=memory.shown,
        )
        memory.learner = learner
        memory.ask_models(completer, judge, episodes)
        if self._serves and own.enabled:
            learner.start()
            self.on_exit(learner.close)

    async def _make_embedder(self) -> Embedder:
        from agentic_flow.agentdb.embedders.registry import open_embedder

        return await self._stack.enter_async_context(
            open_embedder(self.settings.agentdb, plugins.load_all("agentic_flow.embedders"))
        )

    async def _open_swarm(self, takeover: bool) -> RunService:
        from agentic_flow.swarm.service import Swarm

        runs = await self.runs()
        if isinstance(runs, Swarm):
            await self._stack.enter_async_context(runs.open(takeover=takeover))
        return runs

    async def _make_watch(self) -> RunWatch:
        from agentic_flow.runtime.deferred import RunWatch
        from agentic_flow.runtime.retention import RunRetention

        tools = self.settings.tools
        if tools.policy_file is not None:
            from agentic_flow.tools.policy import load_policy

            await asyncio.to_thread(load_policy, tools.policy_file)
        plugins.load_all("agentic_flow.toolsets")
        if (self.settings.data_dir / AUDIT_FILE).exists():
            await self._audit()
        self._watch = RunWatch(
            self.settings.swarm,
            self.settings.data_dir,
            begun=lambda: "swarm" in self._made,
            begin=lambda: self.swarm(takeover=True),
        )
        self.metrics.register(self._watch.metrics)
        await self._watch.start()
        retention = RunRetention(self.settings.swarm, self.settings.data_dir, removed=self._clear_boards)
        self.on_exit(retention.close)
        retention.start()
        return self._watch

    async def _clear_boards(self, tenant: str) -> None:
        """Remove the blackboards of runs that are gone."""
        from agentic_flow.swarm.blackboard import clear_boards
        from agentic_flow.swarm.reader import RunReader

        own = self.settings.swarm
        url = own.database_url.get_secret_value() if own.database_url else None
        reader = RunReader(url, self.settings.data_dir, lease_s=own.lease_s)

        async def is_gone(run_id: str) -> bool:
            return await asyncio.to_thread(reader.get, run_id) is None

        await clear_boards(await self.store(), tenant, is_gone)

    async def _make_runs(self) -> RunService:
        url = self.peer_url("swarm")
        if url is not None:
            from agentic_flow.swarm.remote import RemoteSwarm

            twin = RemoteSwarm(url, **await self._calls("swarm"))
            await self._stack.enter_async_context(twin)
            return twin
        await imported("agentic_flow.swarm.service", "agentic_flow.swarm.engine")
        from agentic_flow.core.clock import SYSTEM_CLOCK
        from agentic_flow.swarm.engine import SqlRunEngine
        from agentic_flow.swarm.schedule_store import ScheduleStore
        from agentic_flow.swarm.service import Swarm

        settings = self.settings
        own = settings.swarm
        url = own.database_url.get_secret_value() if own.database_url else None
        return Swarm(
            own,
            completer=await self.completer(),
            store=await self.store(),
            memory=await self.memory(),
            memory_enabled=settings.memory.enabled,
            toolbox=await self.toolbox(),
            engine=SqlRunEngine(
                url,
                settings.data_dir,
                lease_s=own.lease_s,
                runs_parallel_max=own.runs_parallel_max,
                queue_runs_max=own.queue_runs_max,
                tenant_runs_max=own.tenant_runs_max,
                queue_starts_per_minute=own.queue_starts_per_minute,
                peer_patience_s=own.peer_patience_s,
            ),
            catalog=await asyncio.to_thread(definition_catalog, settings),
            schedules=ScheduleStore(url, settings.data_dir, SYSTEM_CLOCK),
            ingest_settings=settings.agentdb,
            stream=settings.gateway.stream,
            tool_timeout_s=settings.tools.timeout_s,
            approval_timeout_s=settings.tools.approval_timeout_s,
        )

    async def _make_toolbox(self) -> ToolBox:
        await imported("agentic_flow.agentdb.reading", "agentic_flow.agentdb.tools", *TOOL_MODULES)
        from agentic_flow.agentdb.reading import text_of
        from agentic_flow.agentdb.tools import memory_tools
        from agentic_flow.memory.tools import reasoning_tools
        from agentic_flow.swarm.artifact_tools import artifact_tools
        from agentic_flow.swarm.blackboard import board_tools
        from agentic_flow.tools.files import file_tools
        from agentic_flow.tools.policy import load_policy
        from agentic_flow.tools.shell import shell_tools
        from agentic_flow.tools.toolbox import StandardToolBox

        settings = self.settings.tools
        policy = load_policy(settings.policy_file)
        audit = await self._audit()
        store = await self.store()
        # One reader for memory, tools and reviews: line numbers mean the same lines everywhere.
        tools = [
            *file_tools(text_of=text_of),
            *shell_tools(settings),
            *memory_tools(store),
            *board_tools(store),
            *artifact_tools(),
        ]
        tools += reasoning_tools(await self.memory())
        for toolset in plugins.load_all("agentic_flow.toolsets").values():
            tools += toolset()
        return StandardToolBox(tools, settings=settings, policy=policy, audit=audit, asked_by_callers=True)

    async def _audit(self) -> AuditLog:
        return await self._once("audit", self._make_audit)

    async def _make_audit(self) -> AuditLog:
        from agentic_flow.tools.audit import AuditLog

        audit = await asyncio.to_thread(AuditLog, self.settings.data_dir / AUDIT_FILE)
        self._stack.callback(audit.close)
        return audit

    async def erasers(self) -> dict[str, Callable[[str], Awaitable[int]]]:
        """Place → what removes a tenant's data there. Only where the databases are ours to write."""
        found: dict[str, Callable[[str], Awaitable[int]]] = {"memory": self._erase_memory}
        if self.peer_url("swarm") is None:
            found["runs"] = self._erase_runs
        if self.peer_url("platform") is None:
            found["gateway"] = self._erase_gateway
        return found

    async def _erase_memory(self, tenant: str) -> int:
        return await (await self.store()).erase_tenant(tenant)

    async def _erase_gateway(self, tenant: str) -> int:
        from agentic_flow.gateway.service import Gateway

        gateway = await self.completer()
        assert isinstance(gateway, Gateway), "no platform elsewhere is configured"
        return await gateway.erase_tenant(tenant)

    async def survey_backups(self, tenant: str, folders: Sequence[Path] = ()) -> BackupSurvey:
        """Which backups still hold a tenant that was erased: of `agentdb.backups_dirs`, of those that were
        made of this data folder, and of `folders`. Also which histories that are not this database's own:
        those of databases that it was restored from."""
        from agentic_flow.agentdb.erasure import recorded_backups, survey_backups
        from agentic_flow.agentdb.lineage import other_histories
        from agentic_flow.agentdb.manifest import DATABASE

        settings = self.settings.agentdb
        notes: list[str] = []
        if self.peer_url("agentdb") is not None:
            notes.append(
                "the database is a service, whose backups are where it runs: look there, or name the folders"
            )
        elif settings.database_url is not None:
            notes.append(
                "the database is PostgreSQL, whose base backups, archived log and dumps are its own: those "
                "made until now hold the tenant as long as they are kept"
            )

        def look() -> BackupSurvey:
            # Also where the database is elsewhere now: backups of the time before are not.
            database = self.settings.data_dir / DATABASE
            others = other_histories(database, settings.history_dir, in_use=not notes)
            return survey_backups(
                tenant,
                (*settings.backups_dirs, *folders),
                recorded_backups(database),
                histories=others.folders,
                notes=(*notes, *others.notes),
            )

        return await asyncio.to_thread(look)

    async def _erase_runs(self, tenant: str) -> int:
        from agentic_flow.swarm.leases import Leases, RunDatabase

        own = self.settings.swarm
        url = own.database_url.get_secret_value() if own.database_url else None
        database = RunDatabase(url, self.settings.data_dir, pooled=False)
        try:
            return await asyncio.to_thread(Leases(database, lease_s=own.lease_s).erase_tenant, tenant)
        finally:
            database.close()

    async def _make_identity(self) -> Identity:
        from agentic_flow.runtime.identity import Identity

        identity = await asyncio.to_thread(
            Identity, self.settings.data_dir / IDENTITY_FILE, self.settings.auth
        )
        self._stack.callback(identity.close)
        return identity

    async def tokens(self) -> TokenSource:
        """What calls to neighbours are made with: our own key as a client, tokens for others as a server."""
        return await self._once("tokens", self._make_tokens)

    async def _make_tokens(self) -> TokenSource:
        peers = self.settings.peers
        key = resolve(peers.token, peers.token_file)
        if not self._serves:
            return OwnKey(key)
        url = self.peer_url("platform")
        if url is None:
            return ForOthers(await self.identity(), auth_required=self.settings.auth.required)
        from agentic_flow.core.remote_auth import ExchangedTokens

        exchanged = ExchangedTokens(url, key, peers=peers, tls=self.settings.tls)
        self._stack.push_async_callback(exchanged.close)
        return ForOthers(exchanged, auth_required=key.get() is not None)

    async def _calls(self, peer: str) -> _Calls:
        """How a twin calls its peer."""
        peers, tls = self.settings.peers, self.settings.tls
        return {"peers": peers, "tls": tls, "tokens": await self.tokens(), "peer": peer}


class _Calls(TypedDict):
    """Keyword arguments of every HttpTwin."""

    peers: PeerSettings
    tls: TlsSettings
    tokens: TokenSource
    peer: str


class OwnKey:
    """TokenSource of a client: its own API key, whatever principal it believes to be."""

    def __init__(self, key: SecretSource) -> None:
        self._key = key

    async def token(self, principal: Principal) -> str | None:
        """The key, or None when there is none; the server then says whether that is enough."""
        return self._key.get()

    def forget(self, principal: Principal) -> None:
        """A key is kept, not fetched: there is nothing to forget."""


class ForOthers:
    """TokenSource of a server that calls its neighbours in its callers' names.

    Where no authentication is configured the local owner goes without a token, as on one machine. Any other
    principal never does: a neighbour without authentication would take the call for the local owner's.

    Args:
        source: Gives the tokens.
        auth_required: Whether the local owner needs one as well.
    """

    def __init__(self, source: TokenSource, *, auth_required: bool) -> None:
        self._source = source
        self._auth_required = auth_required

    async def token(self, principal: Principal) -> str | None:
        """A token for `principal`.

        Raises:
            Unauthenticated: this process has no credential to act for anybody.
        """
        if principal == LOCAL_OWNER and not self._auth_required:
            return None
        token = await self._source.token(principal)
        if token is None:
            raise Unauthenticated(
                f"this service has no key to act for {principal.subject!r} of {principal.tenant!r}",
                hint="set peers.token_file to a key with the scope platform:act-as",
            )
        return token

    def forget(self, principal: Principal) -> None:
        """See TokenSource."""
        self._source.forget(principal)


def stored_secrets(data_dir: Path) -> Callable[[str], SecretSource]:
    """The encrypted store of a data folder: name of a setting → its secret, read each time it is asked."""
    store = SecretStore(data_dir)
    return lambda name: StoredSecret(store, name)


def with_stored_secrets(settings: Settings) -> Settings:
    """The settings with secrets of the encrypted store where no variable, file or flag gives them.

    Not the keys of model providers: the gateway asks the store for them while it runs, so that they can be
    rotated.
    """
    store = SecretStore(settings.data_dir)
    stored = {name for name in store.names() if not PROVIDER_KEY.fullmatch(name)} & set(secret_names())
    changed = settings
    for name in sorted(stored):
        *sections, leaf = name.split(".")
        section: Any = settings
        for part in sections:
            section = getattr(section, part)
        if getattr(section, leaf) is None and getattr(section, f"{leaf}_file", None) is None:
            value = store.get(name)
            changed = _replaced(changed, sections, leaf, SecretStr(value)) if value else changed
    return changed


def _replaced(section: Any, sections: list[str], leaf: str, value: SecretStr) -> Any:
    if not sections:
        return section.model_copy(update={leaf: value})
    head, *rest = sections
    return section.model_copy(update={head: _replaced(getattr(section, head), rest, leaf, value)})


def definition_places(settings: Settings) -> list[Path]:
    """Folders of agent definitions, weakest first; not all of them exist."""
    from agentic_flow.swarm.definitions import definition_directories

    # Once each: who works in the home folder has the user's and the project's definitions in one place.
    return list(dict.fromkeys(definition_directories(settings, Path.cwd())))


def definition_catalog(settings: Settings) -> DefinitionCatalog:
    """All agent definitions that runs in this folder can use."""
    from agentic_flow.swarm.definitions import DefinitionCatalog

    return DefinitionCatalog(definition_places(settings))


@dataclass(frozen=True, slots=True)
class AuditState:
    """The audit log as a check found it; `first_broken` None: the chain is whole."""

    records: int
    head: str
    first_broken: int | None


async def verify_audit(settings: Settings) -> AuditState:
    """Check the chain of the audit log. A log that does not exist yet is whole and stays absent."""
    from agentic_flow.tools.audit import GENESIS, AuditLog

    path = settings.data_dir / AUDIT_FILE
    if not path.exists():
        return AuditState(0, GENESIS, None)
    log = await asyncio.to_thread(AuditLog, path)
    try:
        records, head = await log.head()
        return AuditState(records, head, await log.verify())
    finally:
        log.close()
