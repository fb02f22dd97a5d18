"""The model gateway beside LiteLLM's proxy and Portkey's gateway: CPU, latency, memory, start.

Every system is a process of its own and asks the same provider, which answers at once; the clients are one
more process. Rounds alternate between the systems, and medians count. What a system costs is the CPU time
that the kernel charges its process and children: a busy machine moves that less than it moves a clock.

Usage: python benchmarks/gateway.py [--system NAME]… [--rounds N] [--seconds S] [--quick] [--soak N] [--json]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gateway_systems as systems
from gateway_systems import Missing, Running
from gateway_traffic import CASES, DELAY_S

TITLE, SOAK_TITLE = "The model gateway", "The model gateway's memory over many requests"
SOAK_REQUESTS = 200_000
ROUNDS, SECONDS = 5, 3.0
CLIENTS, STREAM_CLIENTS = 16, 64
WARM_UP = 300
SOAK_STEPS = 10
MB = 1_000_000
RECORD_BYTES = 224
"""What Python takes for the tuple of one usage record, without what is in it."""
CPU_CASES = ("whole same", "whole translated", "stream same", "stream translated")
TARGETS_CPU_MS = {
    "whole same": 0.25, "whole translated": 0.45, "stream same": 0.7, "stream translated": 1.2,
}  # fmt: skip
TARGETS_TIMES = {"litellm": 30.0, "portkey": 4.0}

NO_FORMATS = "it knows no formats"

Figures = dict[str, Any]


def measure(
    names: Sequence[str] = tuple(systems.SYSTEMS),
    *,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    warm_up: int = WARM_UP,
) -> Figures:
    """Figures by system. One that cannot run has only `missing`, one case that it cannot do likewise."""
    found: Figures = {name: {"cases": {}} for name in names}
    with ExitStack() as stack:
        upstream = stack.enter_context(systems.upstream())
        running: dict[str, Running] = {}
        for name in names:
            try:
                running[name] = stack.enter_context(systems.SYSTEMS[name](upstream))
            except Missing as missing:
                found[name] = {"missing": str(missing)}
                continue
            found[name]["start_cpu_s"] = running[name].first_answer_cpu_s
        for case in CASES:
            _alternate(case, upstream, running, found, rounds, seconds, warm_up)
        for name, at in running.items():
            found[name]["memory_mb"] = at.memory_bytes() / MB
    return {"systems": found, "rounds": rounds, "seconds": seconds, "load_average": systems.load_average()}


def _alternate(
    case: str,
    upstream: str,
    running: dict[str, Running],
    found: Figures,
    rounds: int,
    seconds: float,
    warm_up: int,
) -> None:
    """Rounds of one case, each system in turn."""
    took: dict[str, list[dict[str, float]]] = {}
    for name, at in running.items():
        try:
            _asked(name, at, case, requests=warm_up)
            took[name] = []
        except Missing as missing:
            said = NO_FORMATS if name == systems.RELAY else str(missing)
            found[name]["cases"][case] = {"missing": said}
    for _ in range(rounds):
        # Without a gateway, for the latency that one adds.
        direct = (
            systems.asked(upstream, case, CASES[case].model, {}, clients=CLIENTS, seconds=seconds)
            if case == "latency"
            else {}
        )
        for name, one in took.items():
            figures = _asked(name, running[name], case, seconds=seconds)
            for percentile in ("p50_ms", "p99_ms"):
                if direct:
                    figures[f"added_{percentile}"] = figures[percentile] - direct[percentile]
            one.append(figures)
    for name, one in took.items():
        found[name]["cases"][case] = {key: median(figures[key] for figures in one) for key in one[0]}


def _asked(name: str, at: Running, case: str, **how: float) -> dict[str, float]:
    clients = STREAM_CLIENTS if CASES[case].stream else CLIENTS
    before_s = at.cpu_s()
    figures = systems.asked(
        at.url, case, systems.model_of(name, CASES[case]), at.headers, clients=clients, **how
    )
    return {**figures, "cpu_ms": 1000 * (at.cpu_s() - before_s) / figures["requests"]}


def soak(requests: int, steps: int = SOAK_STEPS) -> Figures:
    """What our memory does over so many requests: whole and streamed, same format and translated.

    The first step fills caches and pools; growth is counted from its end.
    """
    with systems.upstream() as upstream, systems.ours(upstream) as at:
        memory_mb = [at.memory_bytes() / MB]
        for _ in range(steps):
            for case in CPU_CASES:
                _asked("ours", at, case, requests=max(STREAM_CLIENTS, requests // steps // len(CPU_CASES)))
            memory_mb.append(at.memory_bytes() / MB)
    return {
        "requests": requests,
        "memory_mb": memory_mb,
        "growth_mb": memory_mb[-1] - memory_mb[1],
        "load_average": systems.load_average(),
    }


# The report


def _verdict(reached: bool) -> str:
    return "reached" if reached else "**not reached**"


def targets(figures: Figures) -> str:
    """The table of targets."""
    ours = figures["systems"]["ours"]
    rows = [
        (f"CPU ms per request, {case}", f"at most {target:g}", f"{cpu:.3f}", cpu <= target)
        for case, target in TARGETS_CPU_MS.items()
        if (cpu := _figure(ours, case, "cpu_ms")) is not None
    ]
    own = _figure(ours, "whole same", "cpu_ms")
    for peer, target in TARGETS_TIMES.items():
        theirs = _figure(figures["systems"].get(peer, {}), "whole same", "cpu_ms")
        label, wanted = f"throughput per core against {peer}", f"at least {target:g} times"
        if theirs is None or own is None:
            rows.append((label, wanted, "not measured", False))
        else:
            rows.append((label, wanted, f"{theirs / own:.1f} times", theirs / own >= target))
    for percentile, target in LATENCY_TARGETS_MS.items():
        added = _figure(ours, "latency", f"added_{percentile}_ms")
        if added is not None:
            label = f"added latency on a {DELAY_S * 1000:.0f} ms provider, {CLIENTS} clients, {percentile}"
            rows.append((label, f"at most {target:g} ms", f"{added:.2f} ms", added <= target))
    memory, start = ours["memory_mb"], ours["start_cpu_s"]
    rows.append(("memory of a worker", "at most 120 MB", f"{memory:.0f} MB", memory <= 120))
    rows.append(("start to first answer", "at most 1.5 CPU s", f"{start:.2f} CPU s", start <= 1.5))
    return _table(rows)


def _table(rows: list[tuple[str, str, str, bool]]) -> str:
    lines = [
        f"| {label} | {target} | {value} | {_verdict(reached)} |" for label, target, value, reached in rows
    ]
    return "\n".join(["| property | reach | measured | |", "|---|---|---|---|", *lines])


def table(figures: Figures) -> str:
    """Every system beside the others."""
    lines = [
        "| system | " + " | ".join(CPU_CASES) + " | added p50 / p99 ms | memory MB | start CPU s |",
        "|---" * (len(CPU_CASES) + 4) + "|",
    ]
    notes: list[str] = []
    for name, one in figures["systems"].items():
        if "missing" in one:
            lines.append(f"| {name} | not run: {one['missing']} |" + " |" * (len(CPU_CASES) + 2))
            continue
        cells = [_cell(one, case, "cpu_ms", "{:.3f}") for case in CPU_CASES]
        added = [_cell(one, "latency", f"added_{p}_ms", "{:.1f}") for p in ("p50", "p99")]
        cells += [" / ".join(added), f"{one['memory_mb']:.0f}", f"{one['start_cpu_s']:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        notes += [
            f"- {name}, {case}: {at['missing']}" for case, at in one["cases"].items() if "missing" in at
        ]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _figure(system: Figures, case: str, name: str) -> float | None:
    value: float | None = system.get("cases", {}).get(case, {}).get(name)
    return value


def _cell(system: Figures, case: str, name: str, form: str) -> str:
    value = _figure(system, case, name)
    return "—" if value is None else form.format(value)


def reasons(figures: Figures) -> str:
    """Why figures were missed, by what stands beside them; nothing where all were reached."""
    every = figures["systems"]
    ours, relay = every["ours"], every.get(systems.RELAY, {})
    said: list[str] = []
    for case, target in TARGETS_CPU_MS.items():
        own = _figure(ours, case, "cpu_ms")
        if own is None or own <= target:
            continue
        least = _figure(relay, case.replace("translated", "same"), "cpu_ms")
        share = "" if least is None else f"; the relay takes {least:.3f} ms ({least / own:.0%})"
        said.append(f"- CPU, {case}: {own - target:.3f} ms too many{share}. {_WHY_CPU[case]}")
    own = _figure(ours, "whole same", "cpu_ms")
    theirs = _figure(every.get("portkey", {}), "whole same", "cpu_ms")
    if own and theirs and theirs / own < TARGETS_TIMES["portkey"]:
        times = TARGETS_TIMES["portkey"]
        said.append(
            f"- Portkey: {times:g} times its throughput would be {theirs / times:.3f} ms a request. It runs "
            "compiled code (V8), and keeps no budget, limit, circuit or ledger."
        )
    if own and any(
        (_figure(ours, "latency", f"added_{percentile}_ms") or 0.0) > target
        for percentile, target in LATENCY_TARGETS_MS.items()
    ):
        said.append(
            f"- Added latency: clients that ask at once wait for each other. {CLIENTS} requests are "
            f"{own * CLIENTS:.1f} ms of a worker's one core: the middle one waits up to half of that, "
            "the last one for all of it, and for the provider and the clients on the same two cores."
        )
    return "\n".join(["", "", "Why figures were missed:", "", *said, "", _PROFILE]) if said else ""


_PROFILE = """\
A whole passed-through request makes about 130 calls of Python functions (345 before it went without a task,
see decision 0019; 190 before the last round) and 200 of functions in C (cProfile, 2000 requests). By samples
of its time a quarter is sockets and the event loop, a sixth HTTP on both sides; the rest is spread over the
key, limits, budget, circuit, ledger, metrics and JSON, none of them 8 %. Fifty calls fewer saved a tenth of
the time, so that half of it is out of reach of interpreted Python that does all of this; compiled code would
be next. A stream still has a task and its generators: some 500 calls for all of it, and 14 for each chunk."""

_WHY_CPU = {
    "whole same": "The rest is interpreted Python, spread evenly: see below.",
    "whole translated": "Both formats are decoded into nine typed records and encoded, on top of the same.",
    "stream same": "Each chunk is parsed for its usage and its end, which an honest bill needs.",
    "stream translated": "Each chunk becomes a typed event, is counted, and is written anew.",
}
LATENCY_TARGETS_MS = {"p50": 1.0, "p99": 5.0}


def text_of(figures: Figures) -> str:
    """The section of RESULTS.md from figures."""
    return f"""{targets(figures)}{reasons(figures)}

CPU ms per request (whole) and per answer of 20 chunks, 5 ms apart (stream). `same`: OpenAI's format on both
sides; `translated`: Anthropic's Messages to OpenAI's Chat Completions.

{table(figures)}

`relay` only hands bytes on, on the same event loop and parser: the least that Python costs here.
`ours` checks a real key, keeps a budget and limits for each request, and writes usage, circuits and metrics;
`traced` also sends every span and metric to a collector. LiteLLM checks its master key, without budgets,
which need a PostgreSQL; Portkey's open gateway has neither keys nor budgets. One worker each, {CLIENTS}
clients ({STREAM_CLIENTS} for streams),
medians of {figures["rounds"]} alternating rounds of {figures["seconds"]:g} s.
Load average of the machine: {figures["load_average"]:.1f}; its two cores also ran the provider and the
clients.

`make bench-gateway`"""


def section() -> str:
    """The section of RESULTS.md: measured now."""
    return text_of(measure())


def soak_section() -> str:
    """The section about memory: measured now."""
    return soak_text_of(soak(SOAK_REQUESTS))


def _why_grown(soaked: Figures) -> str:
    """What is known of growth beyond the target."""
    each_bytes = soaked["growth_mb"] * MB / max(1, soaked["requests"] * (SOAK_STEPS - 1) / SOAK_STEPS)
    if soaked["growth_mb"] <= 5:
        return ""
    if each_bytes > RECORD_BYTES:
        return f" It is {each_bytes:.0f} bytes a request, and was not explained."
    return (
        f" It is {each_bytes:.0f} bytes a request; one record of one alone\nhas {RECORD_BYTES}, so none "
        "is kept for each. It is in the arenas of Python's allocator: as many as it ever needed at once,"
        "\nwhile what is in use stays the same."
    )


def soak_text_of(soaked: Figures) -> str:
    """The section about memory from figures."""
    growth, most = soaked["growth_mb"], max(soaked["memory_mb"])
    rows = [
        (
            f"growth in a soak of {soaked['requests']:,} requests",
            "at most 5 MB",
            f"{growth:.1f} MB",
            growth <= 5,
        ),
        ("most that it held", "at most 120 MB", f"{most:.0f} MB", most <= 120),
    ]
    steps = ", ".join(f"{held:.0f}" for held in soaked["memory_mb"])
    return f"""{_table(rows)}

A quarter each of whole and streamed answers, same format and translated, over one worker with all policies.
MB at the start and after each tenth: {steps}. The first tenth fills caches and pools; growth is counted from
its end.{_why_grown(soaked)} Load average of the machine: {soaked["load_average"]:.1f}.

`make bench-gateway-soak`"""


def main() -> None:
    """Print the section or the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--system", choices=list(systems.SYSTEMS), action="append", help="measure only these")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each measurement")
    parser.add_argument("--quick", action="store_true", help="one short round: does everything work?")
    parser.add_argument("--soak", type=int, metavar="N", help="only this: memory over N requests")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.soak is not None:
        print(json.dumps(soak(options.soak)))
        return
    names = options.system or list(systems.SYSTEMS)
    rounds, seconds, warm_up = (1, 0.3, 64) if options.quick else (options.rounds, options.seconds, WARM_UP)
    figures = measure(names, rounds=rounds, seconds=seconds, warm_up=warm_up)
    print(json.dumps(figures) if options.json else text_of(figures))


if __name__ == "__main__":
    main()
