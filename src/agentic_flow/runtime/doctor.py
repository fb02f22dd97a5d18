"""`agentic-flow doctor`: looks at what the product needs on this machine and says what to do about the rest.

Everything here only looks: nothing is created but a probe file in the data folder, which is removed again.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agentic_flow.core.checks import Check
from agentic_flow.core.settings import ProviderSettings, Settings

if TYPE_CHECKING:
    from agentic_flow.gateway.policies import GatewayPolicies

GIB = 1024**3
_FREE_WARN_BYTES = GIB
_FREE_BROKEN_BYTES = 64 * 1024**2
_PROBE_TIMEOUT_S = 1.0
_POSTGRES_TIMEOUT_S = 5
_CERTIFICATE_NOTE_DAYS = 14
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order a reader wants them."""
    checks: list[Check] = []
    for look in (
        _python,
        _data_dir,
        _databases,
        _run_database,
        _providers,
        _default_model,
        _embedder,
        _binding,
        _tls,
        _ports,
        _terminal,
    ):
        checks.extend(look(settings))
    return checks


def _python(_: Settings) -> Iterator[Check]:
    version = platform.python_version()
    yield Check("python", "ok", f"Python {version}, {platform.system()} {platform.machine()}")


def _data_dir(settings: Settings) -> Iterator[Check]:
    folder = settings.data_dir
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    name = "data folder"
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".agentic-flow-doctor-") as probe:
            probe.write(b"probe")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        yield Check(
            name,
            "broken",
            f"{str(folder)!r} cannot be written: {error.strerror}",
            "choose another with --data-dir or AGENTIC_FLOW_DATA_DIR, or correct its permissions",
        )
        return
    free = shutil.disk_usage(nearest).free
    room = f"{free / GIB:.1f} GiB free"
    if free < _FREE_BROKEN_BYTES:
        yield Check(name, "broken", f"{str(folder)!r}: {room}", "free some space, or use another disk")
    elif free < _FREE_WARN_BYTES:
        yield Check(name, "note", f"{str(folder)!r}: {room}", "large inputs may not fit")
    else:
        made = "" if nearest == folder else " (made at the first run)"
        yield Check(name, "ok", f"{str(folder)!r}{made}: {room}")


def _databases(settings: Settings) -> Iterator[Check]:
    """Every SQLite file of the data folder, by the database's own check."""
    import apsw

    files = [path for path in sorted(settings.data_dir.rglob("*")) if _is_sqlite(path)]
    damaged = False
    for path in files:
        try:
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
            try:
                found = [str(row[0]) for row in cast(Any, connection).execute("PRAGMA quick_check(5)")]
            finally:
                connection.close()
        except apsw.Error as error:
            found = [str(error)]
        if found != ["ok"]:
            damaged = True
            yield Check(
                "database", "broken", f"{str(path)!r} is damaged: {found[0]}", "restore it from a backup"
            )
    if not damaged:
        yield Check("database", "ok", f"{len(files)} database files, all sound" if files else "none yet")


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except OSError:
        return False


def _run_database(settings: Settings) -> Iterator[Check]:
    url = settings.swarm.database_url
    if url is None:
        yield Check("run database", "ok", "SQLite in the data folder")
        return
    import psycopg

    try:
        with psycopg.connect(url.get_secret_value(), connect_timeout=_POSTGRES_TIMEOUT_S) as connection:
            version = connection.info.server_version
    except psycopg.Error as error:
        yield Check(
            "run database",
            "broken",
            f"PostgreSQL does not answer: {' '.join(str(error).split())}",
            "correct AGENTIC_FLOW_SWARM__DATABASE_URL, or start the server",
        )
    else:
        yield Check("run database", "ok", f"PostgreSQL {version // 10_000}.{version % 10_000}")


def _providers(settings: Settings) -> Iterator[Check]:
    from agentic_flow.core.errors import AgenticFlowError
    from agentic_flow.runtime.build import stored_secrets

    stored = stored_secrets(settings.data_dir)
    yield Check("model extractive", "ok", "built in: selects and cites passages, writes nothing of its own")
    for name, variable, usual_url in (
        ("anthropic", "ANTHROPIC_API_KEY", "https://api.anthropic.com"),
        ("openrouter", "OPENROUTER_API_KEY", "https://openrouter.ai/api/v1"),
        ("openai", "OPENAI_API_KEY", "https://api.openai.com/v1"),
    ):
        provider: ProviderSettings = getattr(settings.gateway, name)
        if provider.api_key_file is not None and not os.access(provider.api_key_file, os.R_OK):
            yield Check(
                f"model {name}",
                "broken",
                f"the key file {str(provider.api_key_file)!r} cannot be read",
                f"correct the path or set {variable}",
            )
            continue
        where = "a key is configured"
        configured = provider.api_key is not None or provider.api_key_file is not None
        if not configured:
            try:
                configured = stored(f"gateway.{name}.api_key").get() is not None
                where = "a key is stored"
            except AgenticFlowError as error:
                yield Check(f"model {name}", "broken", error.message, error.hint)
                continue
        if configured:
            yield Check(f"model {name}", "ok", f"{where}; {provider.base_url}")
        elif provider.base_url != usual_url:
            yield Check(f"model {name}", "ok", f"without a key; {provider.base_url}")
        else:
            yield Check(
                f"model {name}", "note", "no key", f"set {variable} to use it (runs work without any key)"
            )


def _default_model(settings: Settings) -> Iterator[Check]:
    """Which model a run takes when none is named."""
    import asyncio

    from agentic_flow.core import plugins
    from agentic_flow.core.auth import LOCAL_OWNER
    from agentic_flow.core.errors import AgenticFlowError
    from agentic_flow.gateway.service import Gateway
    from agentic_flow.runtime.build import Runtime, stored_secrets, with_stored_secrets

    async def resolve() -> str:
        if settings.peers.platform_url is not None:
            async with Runtime(settings) as runtime:
                return (await (await runtime.completer()).resolve(None, principal=LOCAL_OWNER)).id
        # Not the gateway at work, which makes its database and writes that it lives.
        gateway = Gateway(
            with_stored_secrets(settings).gateway,
            extra_providers=plugins.load_all("agentic_flow.providers"),
            policies=await asyncio.to_thread(_policies, settings),
            extra_checkers=plugins.load_all("agentic_flow.checkers"),
            extra_guardrails=plugins.load_all("agentic_flow.guardrails"),
            stored_secrets=stored_secrets(settings.data_dir),
        )
        async with gateway:
            return (await gateway.resolve(None, principal=LOCAL_OWNER)).id

    try:
        yield Check("default model", "ok", asyncio.run(resolve()))
    except AgenticFlowError as error:
        yield Check("default model", "broken", error.message, error.hint)


def _policies(settings: Settings) -> GatewayPolicies:
    """Those in force; what is read stays as it is."""
    from agentic_flow.gateway.policies import GatewayPolicies
    from agentic_flow.gateway.policy_store import PolicyStore
    from agentic_flow.gateway.stores import gateway_database

    database = gateway_database(settings.gateway, settings.data_dir)
    if database.file is not None and not _is_sqlite(database.file):
        return GatewayPolicies()  # not made yet; a damaged file is told of by the check of all databases
    tables = "sqlite_master WHERE name" if database.is_sqlite else "pg_tables WHERE tablename"
    try:
        if database.rows(f"SELECT 1 FROM {tables} = 'gw_policies'"):  # noqa: S608 - constants
            return PolicyStore(database).current().policies
        return GatewayPolicies()
    finally:
        database.close()


def _embedder(settings: Settings) -> Iterator[Check]:
    """Whether there is one of the name that is configured. It is not asked anything."""
    from agentic_flow.agentdb.embedders.registry import make_embedder
    from agentic_flow.core import plugins
    from agentic_flow.core.errors import AgenticFlowError

    try:
        make_embedder(settings.agentdb, plugins.load_all("agentic_flow.embedders"))
        yield Check("embedder", "ok", settings.agentdb.embedder)
    except AgenticFlowError as error:
        yield Check("embedder", "broken", error.message, error.hint)


def _binding(settings: Settings) -> Iterator[Check]:
    host = settings.serve.host
    if host in _LOOPBACK:
        yield Check("binding", "ok", f"servers listen on {host}, this machine only")
    elif settings.auth.required:
        yield Check("binding", "ok", f"servers listen on {host}; every caller needs a key")
    else:
        yield Check(
            "binding",
            "broken",
            f"serve.host is {host!r} and authentication is off: the servers will refuse to start",
            "set AGENTIC_FLOW_AUTH__REQUIRED=true, or serve.host to 127.0.0.1",
        )


def _tls(settings: Settings) -> Iterator[Check]:
    tls = settings.tls
    if tls.certificate_file is None or tls.key_file is None:
        yield Check(
            "TLS", "note", "off: plain HTTP", "set tls.certificate_file and tls.key_file to switch it on"
        )
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            tls.certificate_file, tls.key_file
        )
        if tls.ca_file is not None:
            ssl.create_default_context(cafile=str(tls.ca_file))
    except (OSError, ssl.SSLError) as error:
        yield Check(
            "TLS", "broken", f"the certificate cannot be used: {error}", "correct the tls.*_file settings"
        )
    else:
        yield _validity(tls.certificate_file)


def _validity(certificate_file: Path) -> Check:
    """For how long a certificate is good."""
    from cryptography import x509

    left = x509.load_pem_x509_certificate(certificate_file.read_bytes()).not_valid_after_utc - datetime.now(
        UTC
    )
    named = f"certificate {str(certificate_file)!r}"
    hint = "renew it, such as by `agentic-flow certs renew`"
    if left.total_seconds() <= 0:
        return Check("TLS", "broken", f"{named} expired {-left.days} days ago", hint)
    if left.days < _CERTIFICATE_NOTE_DAYS:
        return Check("TLS", "note", f"{named} is good for only {left.days} days", hint)
    return Check("TLS", "ok", f"{named}, good for {left.days} days")


def _ports(settings: Settings) -> Iterator[Check]:
    for service in ("platform", "agentdb", "swarm"):
        port: int = getattr(settings.serve, f"{service}_port")
        name = f"port {port} ({service})"
        if port == 0 or _is_free(settings.serve.host, port):
            yield Check(name, "ok", "free" if port else "any free port")
        elif (running := _our_service(settings, port)) is not None:
            yield Check(name, "ok", f"agentic-flow {running} is running there")
        else:
            owner = _listener(port)
            yield Check(
                name,
                "note",
                f"taken{f' by {owner}' if owner else ''}",
                f"set AGENTIC_FLOW_SERVE__{service.upper()}_PORT to another port before `agentic-flow serve`",
            )


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _our_service(settings: Settings, port: int) -> str | None:
    """The name by which a server of ours on this port introduces itself."""
    host = "127.0.0.1" if settings.serve.host in ("0.0.0.0", "::") else settings.serve.host  # noqa: S104 - compared
    if settings.tls.certificate_file is None:
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
    else:
        # Only its name is asked for; nothing is sent that a stranger could use.
        context = ssl._create_unverified_context()  # noqa: S323 # pyright: ignore[reportPrivateUsage]
        connection = http.client.HTTPSConnection(host, port, timeout=_PROBE_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health", headers={"host": f"127.0.0.1:{port}"})
        body = json.loads(connection.getresponse().read(64 * 1024))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    known = isinstance(body, dict) and {"service", "status", "version"} <= set(cast(dict[str, Any], body))
    return str(cast(dict[str, Any], body)["service"]) if known else None


def _listener(port: int) -> str | None:
    """`name (pid N)` of the process that listens on a port, where Linux lets us see it."""
    inodes: set[str] = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in _lines(table)[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    if not inodes:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _terminal(_: Settings) -> Iterator[Check]:
    if not sys.stderr.isatty():
        yield Check("terminal", "note", "none: plain text, no progress bars")
        return
    colour = "no colour (NO_COLOR is set)" if os.environ.get("NO_COLOR") else "colour"
    size = shutil.get_terminal_size()
    encoding = sys.stdout.encoding or "unknown encoding"
    yield Check(
        "terminal", "ok", f"{os.environ.get('TERM', 'unknown')}, {size.columns} columns, {colour}, {encoding}"
    )
