"""A dashboard of what `/metrics` shows, as Grafana reads it."""

from __future__ import annotations

import json
from typing import Any

_WIDTH, _HEIGHT = 12, 8
_COUNT = "agentic_flow_http_request_duration_seconds_count"
_BUCKET = "agentic_flow_http_request_duration_seconds_bucket"
_CALLS = "agentic_flow_gateway_call_duration_seconds"

PANELS = (
    ("Services up", "short", (("{{job}}", 'up{job=~"platform|agentdb|swarm"}'),)),
    ("Requests per second", "reqps", (("{{service}}", f"sum by (service) (rate({_COUNT}[5m]))"),)),
    (
        "Share of requests that fail",
        "percentunit",
        (
            (
                "{{service}}",
                f'sum by (service) (rate({_COUNT}{{status=~"5.."}}[5m]))'
                f" / sum by (service) (rate({_COUNT}[5m]))",
            ),
        ),
    ),
    (
        "Time of a request, p50 and p95",
        "s",
        (
            ("{{service}} p50", f"histogram_quantile(0.5, sum by (service, le) (rate({_BUCKET}[5m])))"),
            ("{{service}} p95", f"histogram_quantile(0.95, sum by (service, le) (rate({_BUCKET}[5m])))"),
        ),
    ),
    ("Runs that wait", "short", (("{{queue}}", "agentic_flow_queue_waiting_runs"),)),
    ("Longest wait of a run", "s", (("{{queue}}", "agentic_flow_queue_oldest_wait_seconds"),)),
    ("Runs at work", "short", (("{{queue}}", "agentic_flow_queue_running_runs"),)),
    (
        "Model calls per second",
        "reqps",
        (("{{provider}} {{model}}", f"sum by (provider, model) (rate({_CALLS}_count[5m]))"),),
    ),
    (
        "Time of a model call, p95",
        "s",
        (
            (
                "{{provider}}",
                f"histogram_quantile(0.95, sum by (provider, le) (rate({_CALLS}_bucket[5m])))",
            ),
        ),
    ),
    (
        "Left of budgets",
        "currencyUSD",
        (("{{scope}} {{name}} {{tenant}}", "agentic_flow_gateway_budget_left_usd"),),
    ),
)
"""Title, unit, and what is drawn: legend and expression."""


def dashboard() -> str:
    """The dashboard as JSON, for Grafana's provisioning or its import."""
    panels = [_panel(number, *panel) for number, panel in enumerate(PANELS)]
    data = {
        "uid": "agentic-flow",
        "title": "Agentic Flow",
        "description": "written by agentic-flow deploy render; do not edit",
        "tags": ["agentic-flow"],
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "type": "datasource", "query": "prometheus", "label": "Prometheus"}]
        },
        "panels": panels,
    }
    return json.dumps(data, indent=2) + "\n"


def _panel(number: int, title: str, unit: str, drawn: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number + 1,
        "title": title,
        "type": "timeseries",
        "datasource": source,
        "gridPos": {
            "h": _HEIGHT,
            "w": _WIDTH,
            "x": number % 2 * _WIDTH,
            "y": number // 2 * _HEIGHT,
        },
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "legendFormat": legend, "expr": expression}
            for index, (legend, expression) in enumerate(drawn)
        ],
    }
