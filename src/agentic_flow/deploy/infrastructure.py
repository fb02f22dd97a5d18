"""The parts that are not ours: proxy, PostgreSQL, Prometheus and the OpenTelemetry collector."""

from __future__ import annotations

from collections.abc import Sequence

from agentic_flow.deploy.caddy import ADMIN
from agentic_flow.deploy.parts import (
    FILES_DIR,
    FILES_GROUP,
    Limits,
    Part,
    Published,
    Secret,
    Volume,
    certificate_files,
)
from agentic_flow.deploy.spec import Tier

PROMETHEUS_PORT = 9090
WORKER_PORT = 9001
COLLECTOR_PORT = 4318
COLLECTOR_URL = f"https://collector:{COLLECTOR_PORT}"
DATABASE, DATABASE_USER, DATABASE_PORT = "agentic_flow", "agentic_flow", 5432
_CADDY_CONFIG = ("--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile")
_UNPRIVILEGED = f"{FILES_GROUP}:{FILES_GROUP}"

_LIMITS: dict[Tier, dict[str, Limits]] = {
    "small": {
        "postgres": Limits(512, 1.0, 256),
        "prometheus": Limits(512, 1.0, 128),
        "collector": Limits(256, 1.0, 128),
    },
    "medium": {
        "postgres": Limits(2048, 2.0, 512),
        "prometheus": Limits(1024, 1.0, 128),
        "collector": Limits(256, 1.0, 128),
    },
    "large": {
        "postgres": Limits(4096, 4.0, 1024),
        "prometheus": Limits(2048, 2.0, 128),
        "collector": Limits(512, 2.0, 128),
    },
}


def proxy(config: str, published: Sequence[Published], behind: Sequence[str]) -> Part:
    """Caddy: terminates TLS on the published ports and holds requests while a service is replaced.

    Args:
        config: Its configuration among the rendered files.
        published: The ports.
        behind: The stack's other parts.
    """
    targets = {one.part for one in published}
    return Part(
        name="proxy",
        image="caddy",
        tag="2",
        command=("caddy", "run", *_CADDY_CONFIG),
        environment={"XDG_CONFIG_HOME": "/tmp/config", "XDG_DATA_HOME": "/tmp/data"},  # noqa: S108
        files={"/etc/caddy/Caddyfile": config},
        has_certificate=True,
        limits=Limits(256, 1.0, 128),
        user=_UNPRIVILEGED,
        # The image's binary carries this capability, and the kernel refuses to start it where that is
        # not allowed; its ports need none.
        capabilities=("NET_BIND_SERVICE",),
        # No probe: its image has no program that asks. Whether it passes requests on shows from outside.
        waits_for=tuple(name for name in behind if name in targets),
        # Its configuration is the same, only what that names has changed: hence --force.
        reload=("caddy", "reload", *_CADDY_CONFIG, "--address", ADMIN, "--force"),
        ours=False,
    )


def postgres(tier: Tier) -> Part:
    """PostgreSQL 17 with pgvector, over TLS alone."""
    ca, certificate, key = certificate_files("postgres")
    private = "/tmp/server.key"  # noqa: S108 - inside the container, a file system of its own
    options = {
        "ssl": "on",
        "ssl_cert_file": certificate,
        "ssl_key_file": private,
        "ssl_ca_file": ca,
        "shared_buffers": f"{_LIMITS[tier]['postgres'].memory_mib // 4}MB",
    }
    words = " ".join(f"-c {name}={value}" for name, value in options.items())
    # It refuses a key that others could read, and a secret's file cannot be given to its user.
    own_key = f"install -m 0600 {key} {private}"
    start = f"{own_key} && exec docker-entrypoint.sh postgres {words}"
    return Part(
        name="postgres",
        image="pgvector/pgvector",
        tag="pg17",
        entry=("sh", "-c", start),
        environment={
            "POSTGRES_USER": DATABASE_USER,
            "POSTGRES_DB": DATABASE,
            "POSTGRES_PASSWORD_FILE": f"{FILES_DIR}/postgres_password",
        },
        secrets=(Secret("postgres_password", "password"),),
        has_certificate=True,
        data=Volume("postgres-data", "/var/lib/postgresql/data"),
        scratch=("/tmp", "/var/run/postgresql"),  # noqa: S108
        limits=_LIMITS[tier]["postgres"],
        user="999:999",
        groups=(FILES_GROUP,),
        # The server that fills the first database has no TCP port; asking by TCP waits for the real one.
        probe=("pg_isready", "-q", "-h", "127.0.0.1", "-U", DATABASE_USER, "-d", DATABASE),
        stop_s=60,
        reload=("sh", "-c", f"{own_key} && kill -HUP 1"),
        ours=False,
    )


def database_url(password: str) -> str:
    """The address under which the services find PostgreSQL, its certificate checked.

    Args:
        password: Letters, digits and `-_` only, as `secrets.token_urlsafe` makes them.
    """
    ca, _, _ = certificate_files("")
    return (
        f"postgresql://{DATABASE_USER}:{password}@postgres:{DATABASE_PORT}/{DATABASE}"
        f"?sslmode=verify-full&sslrootcert={ca}"
    )


def prometheus(tier: Tier) -> Part:
    """Prometheus: gathers the metrics of our services and watches the rules."""
    return Part(
        name="prometheus",
        image="prom/prometheus",
        tag="v2.53.3",
        command=(
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
            "--storage.tsdb.retention.time=15d",
            f"--web.listen-address=0.0.0.0:{PROMETHEUS_PORT}",
        ),
        files={
            "/etc/prometheus/prometheus.yml": "observability/prometheus.yml",
            "/etc/prometheus/alerts.yml": "observability/alerts.yml",
        },
        has_certificate=True,
        data=Volume("agent-metrics", "/prometheus"),
        limits=_LIMITS[tier]["prometheus"],
        user="65534:65534",
        groups=(FILES_GROUP,),
        probe=("promtool", "check", "ready", f"--url=http://127.0.0.1:{PROMETHEUS_PORT}"),
        stop_s=30,
        ours=False,
    )


def collector(tier: Tier) -> Part:
    """The OpenTelemetry collector: takes traces and metrics of our services by OTLP."""
    return Part(
        name="collector",
        image="otel/opentelemetry-collector",
        tag="0.116.1",
        command=("--config=/etc/otelcol/collector.yaml",),
        files={"/etc/otelcol/collector.yaml": "observability/collector.yaml"},
        has_certificate=True,
        limits=_LIMITS[tier]["collector"],
        user=_UNPRIVILEGED,
        ours=False,
    )


def trace_environment(name: str) -> dict[str, str]:
    """What a service's exporter of traces and metrics is told, by OpenTelemetry's own variables."""
    ca, certificate, key = certificate_files(name)
    return {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": ca,
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": certificate,
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": key,
        "OTEL_RESOURCE_ATTRIBUTES": f"service.namespace=agentic-flow,service.instance.id={name}",
    }
