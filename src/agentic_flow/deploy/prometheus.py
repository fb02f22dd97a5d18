"""What is observed: where metrics are gathered, when they call for a person, and where traces go."""

from __future__ import annotations

from typing import Any

from agentic_flow.deploy.infrastructure import COLLECTOR_PORT
from agentic_flow.deploy.parts import certificate_files
from agentic_flow.deploy.plan import PORTS

_EVERY_S = 15


def configuration() -> dict[str, Any]:
    """prometheus.yml. Every replica of a service is found by its name.

    Workers, which a stack may be without, are looked for less often: each look in vain is a line of its log.
    """
    ca, certificate, key = certificate_files("prometheus")
    jobs = [
        {
            "job_name": name,
            "scheme": "https",
            "tls_config": {"ca_file": ca, "cert_file": certificate, "key_file": key, "server_name": name},
            "dns_sd_configs": [
                {
                    "names": [name],
                    "type": "A",
                    "port": port,
                    "refresh_interval": "60s" if name == "worker" else "10s",
                }
            ],
        }
        for name, port in PORTS.items()
    ]
    return {
        "global": {"scrape_interval": f"{_EVERY_S}s", "evaluation_interval": f"{_EVERY_S}s"},
        "rule_files": ["/etc/prometheus/alerts.yml"],
        "scrape_configs": [
            {"job_name": "prometheus", "static_configs": [{"targets": ["localhost:9090"]}]},
            *jobs,
        ],
    }


def rules() -> dict[str, Any]:
    """alerts.yml: a first set; each says what it means and what to do."""
    count = "agentic_flow_http_request_duration_seconds_count"
    bucket = "agentic_flow_http_request_duration_seconds_bucket"
    alerts = [
        _alert(
            "ServiceDown",
            f'up{{job=~"{"|".join(PORTS)}"}} == 0 or absent(up{{job="platform"}})',
            "1m",
            "critical",
            "{{ $labels.job }} does not answer",
            "agentic-flow status and agentic-flow logs say why.",
        ),
        _alert(
            "ManyErrors",
            f'sum by (service) (rate({count}{{status=~"5.."}}[5m])) '
            f"/ sum by (service) (rate({count}[5m])) > 0.05",
            "5m",
            "critical",
            "more than 5 % of the requests to {{ $labels.service }} fail",
            "Its log has a line for each, with the error's code.",
        ),
        _alert(
            "SlowRequests",
            f'histogram_quantile(0.95, sum by (service, le) (rate({bucket}{{method="GET"}}[10m]))) > 2',
            "10m",
            "warning",
            "one in twenty reads of {{ $labels.service }} takes more than 2 s",
            "Compare memory and processor with the tier's bounds.",
        ),
        _alert(
            "RunsWait",
            "agentic_flow_queue_oldest_wait_seconds > 300",
            "5m",
            "warning",
            "runs of the queue {{ $labels.queue }} wait for more than 5 minutes",
            "Add workers.",
        ),
        _alert(
            "QueueUnread",
            "increase(agentic_flow_queue_read_failures_total[5m]) > 0",
            "5m",
            "critical",
            "the run database cannot be read",
            "Look at the database.",
        ),
        _alert(
            "ProviderCircuitOpen",
            "agentic_flow_gateway_breaker_state == 2",
            "5m",
            "warning",
            "{{ $labels.provider }} fails for {{ $labels.model }}",
            "Routes with several targets use the others meanwhile.",
        ),
        _alert(
            "BudgetSpent",
            "agentic_flow_gateway_budget_left_usd <= 0",
            "0m",
            "warning",
            "a budget is spent; its calls are refused",
            "agentic-flow budgets list shows which, and until when.",
        ),
        _alert(
            "UsageLost",
            "increase(agentic_flow_gateway_usage_records_lost_total[10m]) > 0",
            "0m",
            "critical",
            "records of usage were lost",
            "Look at the gateway's database and the disk.",
        ),
    ]
    return {"groups": [{"name": "agentic-flow", "rules": alerts}]}


def _alert(name: str, expr: str, lasting: str, severity: str, summary: str, action: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": action},
    }


def collector() -> dict[str, Any]:
    """The collector's configuration: takes OTLP over mutual TLS and says in its log how much came.

    Where traces are to go from there is the operator's: add an exporter and name it in the pipelines.
    """
    ca, certificate, key = certificate_files("collector")
    pipeline = {"receivers": ["otlp"], "processors": ["memory_limiter", "batch"], "exporters": ["debug"]}
    return {
        "receivers": {
            "otlp": {
                "protocols": {
                    "http": {
                        "endpoint": f"0.0.0.0:{COLLECTOR_PORT}",
                        "tls": {"cert_file": certificate, "key_file": key, "client_ca_file": ca},
                    }
                }
            }
        },
        "processors": {
            "memory_limiter": {"check_interval": "1s", "limit_percentage": 75, "spike_limit_percentage": 20},
            "batch": {},
        },
        "exporters": {"debug": {"verbosity": "basic"}},
        "service": {"pipelines": {"traces": pipeline, "metrics": pipeline}},
    }
