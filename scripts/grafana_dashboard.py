"""Writes deploy/grafana.json, the dashboard of `ds4 serve`."""

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[1] / "deploy" / "grafana.json"
SOURCE = {"type": "prometheus", "uid": "${source}"}
HAS = '{model_name=~"$model"}'


def main() -> None:
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")


def quantiles(name: str) -> list[tuple[str, str]]:
    rate = f"sum by (le) (rate(ds4_{name}_bucket{HAS}[$__rate_interval]))"
    return [(f"p{q}", f"histogram_quantile(0.{q}, {rate})") for q in (50, 90, 99)]


def rate(name: str) -> str:
    return f"sum(rate(ds4_{name}_total{HAS}[$__rate_interval]))"


def by(label: str, name: str, which: str = "") -> str:
    return f"sum by ({label}) (rate(ds4_{name}_total{which}[$__rate_interval]))"


def now(name: str) -> str:
    return f"sum(ds4_{name}{HAS})"


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Tokens a second",
        "short",
        [("written", rate("generation_tokens")), ("read", rate("prompt_tokens"))],
    ),
    (
        "Requests",
        "short",
        [
            ("running", now("num_requests_running")),
            ("waiting", now("num_requests_waiting")),
            ("slots", now("slots")),
        ],
    ),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Between two tokens", "s", quantiles("inter_token_latency_seconds")),
    ("Whole requests", "s", quantiles("e2e_request_latency_seconds")),
    ("In the queue", "s", quantiles("request_queue_time_seconds")),
    (
        "How requests end, a second",
        "short",
        [
            (
                "{{finished_reason}}",
                by("finished_reason", "request_success", HAS),
            ),
            ("refused", rate("admission_rejections")),
        ],
    ),
    (
        "Prompt tokens found in the cache",
        "percentunit",
        [("hits", f"{rate('prefix_cache_hits')} / {rate('prefix_cache_queries')}")],
    ),
    (
        "Drafted tokens kept",
        "percentunit",
        [
            (
                "kept",
                rate("spec_decode_num_accepted_tokens")
                + " / "
                + rate("spec_decode_num_draft_tokens"),
            )
        ],
    ),
    ("Power", "watt", [("{{domain}} {{source}}", "ds4_power_watts")]),
    (
        "Joules a written token",
        "joule",
        [
            (
                "{{domain}}",
                f"{by('domain', 'energy_joules')} / scalar({rate('generation_tokens')})",
            )
        ],
    ),
    (
        "Engine",
        "short",
        [("up", now("engine_up")), ("restarts", f"sum(ds4_engine_restarts_total{HAS})")],
    ),
    ("Memory of the server", "bytes", [("resident", "process_resident_memory_bytes")]),
    (
        "Prefixes kept",
        "bytes",
        [("memory", now("prefix_cache_bytes")), ("disk", now("prefix_cache_disk_bytes"))],
    ),
]


def dashboard() -> dict[str, Any]:
    variables = [
        {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"},
        {
            "name": "model",
            "type": "query",
            "label": "Model",
            "datasource": SOURCE,
            "query": "label_values(ds4_slots, model_name)",
            "includeAll": True,
            "multi": True,
            "current": {"text": "All", "value": "$__all"},
            "refresh": 2,
        },
    ]
    return {
        "title": "ds4",
        "uid": "ds4-serve",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": [panel(n, *each) for n, each in enumerate(PANELS)],
    }


def panel(n: int, title: str, unit: str, lines: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "id": n + 1,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": 12 * (n % 2), "y": 8 * (n // 2), "w": 12, "h": 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + k), "datasource": SOURCE, "legendFormat": legend, "expr": expression}
            for k, (legend, expression) in enumerate(lines)
        ],
    }


if __name__ == "__main__":
    main()
