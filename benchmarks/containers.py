"""The images: what they weigh, how soon they are ready, what they take when idle, how soon they are rebuilt.

Each service runs alone, hardened as the stacks run it (read-only root, no capabilities), with its memory in a
new volume; a worker beside a PostgreSQL. Ready is the first 200 of `/health/ready`, from before `docker run`.
Then whole stacks get another version while clients ask for 50 things a second and begin a stream each second:
on PostgreSQL a good one and one that is taken back, and a good one on folders. At last stacks are made ill,
under writes and with runs accepted, of which none may be lost: each service of the main stack is killed,
paused and cut off, then all of it is killed; on another stack PostgreSQL is.

Usage: python benchmarks/containers.py [--json] [--only images|upgrades|faults]
       (needs a Docker engine of its own: root on Debian)
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TITLE = "Containers"
STARTS, PROBES, IDLE_S, REBUILDS = 5, 20, 20.0, 3
HELD_S = 1.0
FAULT_ROUNDS = 3
SEEN_TARGET_S, HEALED_TARGET_S = 5, 15
FAULT_FIGURES = ("seen_s", "healed_s", "writes_s")
PARTS = ("images", "upgrades", "faults")
READY_TARGET_S, REBUILD_TARGET_S, PROBE_TARGET_MS = 10, 10, 60
LIMITS_MB = {"platform": 320, "agentdb": 220, "swarm": 220, "worker": 220}
DATABASE = "postgresql://postgres:for-benchmarks@{host}/postgres"
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests/containers", "tests")]


@contextmanager
def postgres(engine: Any, name: str) -> Iterator[str]:
    """A network with a PostgreSQL, by the name of both."""
    from container import until
    from engine import NEIGHBOURS

    database = f"{name}-db"
    engine.run("network", "create", name)
    password = "--env=POSTGRES_PASSWORD=for-benchmarks"
    engine.run("run", "--detach", f"--name={database}", f"--network={name}", password, NEIGHBOURS["postgres"])
    try:
        ready = ("exec", database, "pg_isready", "--host=127.0.0.1")
        until(lambda: engine.run(*ready, check=False).returncode == 0, "PostgreSQL")
        yield database
    finally:
        engine.run("rm", "--force", "--volumes", database)
        engine.run("network", "rm", name)


def added_mb(engine: Any, image: str) -> float:
    """What an image adds to its base."""
    from engine import BASE_IMAGE

    size, base = (
        int(engine.output("image", "inspect", "--format={{.Size}}", tag)) for tag in (image, BASE_IMAGE)
    )
    return (size - base) / 1e6


def service_figures(engine: Any, target: str, image: str, options: tuple[str, ...]) -> dict[str, float]:
    """Start, memory and probes of one image."""
    from container import Container

    took_s: list[float] = []
    for count in range(STARTS):
        name = f"af-bench-{secrets.token_hex(4)}"
        begun_s = time.monotonic()
        at = Container.run(engine, name, image, target, options=options).wait_ready()
        took_s.append(time.monotonic() - begun_s)
        try:
            if count == STARTS - 1:
                time.sleep(IDLE_S)
                memory_mb = resident_mb(at)
                probe_ms = probe_cpu_ms(at, target)
        finally:
            engine.run("rm", "--force", "--volumes", name)
    return {
        "added_mb": added_mb(engine, image),
        "ready_s": statistics.median(took_s),
        "memory_mb": memory_mb,
        "probe_ms": probe_ms,
    }


def resident_mb(at: Any) -> float:
    """Memory of the container's processes that no other one shares, in millions of bytes."""
    script = "cat /proc/[0-9]*/smaps_rollup | awk '/^Private_/ {kb += $2} END {print kb}'"
    _, printed = at.exec("sh", "-c", script)
    return int(printed.split()[0]) * 1024 / 1e6


def probe_cpu_ms(at: Any, target: str) -> float:
    """CPU time of one health check, by the accounts of a shell that makes many."""
    loop = f"for n in $(seq {PROBES}); do agentic-flow health {target} > /dev/null || exit 1; done; times"
    _, printed = at.exec("bash", "-c", loop)
    words = printed.split()[-2:]  # user and system time of the children, such as 0m1.234s
    seconds = [
        60 * float(word.partition("m")[0]) + float(word.partition("m")[2].rstrip("s")) for word in words
    ]
    return 1000 * sum(seconds) / PROBES


def rebuild_s() -> float:
    """From a changed line of the source to the image, everything else in the build's cache."""
    from engine import build, start
    from images import build_secrets, copy_context

    engine, took_s = start(), []
    with tempfile.TemporaryDirectory() as folder, build_secrets() as options:
        context = copy_context(Path(folder))
        words = ("--file", context / "deploy/docker/Dockerfile", "--target=agentdb", *options)
        build(engine, context, "agentic-flow-rebuild:benchmark", *words)
        changed = context / "src/agentic_flow/core/version.py"
        for _ in range(REBUILDS):
            changed.write_text(changed.read_text("utf-8") + f"# {secrets.token_hex(8)}\n", "utf-8")
            begun_s = time.monotonic()
            build(engine, context, "agentic-flow-rebuild:benchmark", *words)
            took_s.append(time.monotonic() - begun_s)
    engine.run("image", "rm", "agentic-flow-rebuild:benchmark")
    return statistics.median(took_s)


def upgrades(engine: Any, images: Any) -> list[dict[str, Any]]:
    """What clients noticed of another version, by the stack's store and how good the version was."""
    from faults import ON_POSTGRESQL
    from traffic import RATE_PER_S
    from upgrades import BAD, GOOD, make_versions, opened, streaming_provider, upgraded

    make_versions(engine, images)
    found: list[dict[str, Any]] = []
    stacks: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = ((ON_POSTGRESQL, (GOOD, BAD)), ({}, (GOOD,)))
    for spec, tags in stacks:
        with (
            tempfile.TemporaryDirectory() as folder,
            streaming_provider() as provider,
            opened(engine, provider, Path(folder), **spec) as place,
        ):
            for tag in tags:
                begun_s = time.monotonic()
                done, seen = upgraded(place, tag, rate_per_s=RATE_PER_S)
                ended_s = time.monotonic() - begun_s
                assert done.code == (7 if tag == BAD else 0), done.err
                found.append(
                    {
                        "store": spec.get("store", "directory"),
                        "good": tag == GOOD,
                        "took_s": ended_s,
                        "pause_s": done.data.get("pause_s"),
                        "requests": len(seen.took_s),
                        "failed": sum(seen.failures.values()) + seen.given_up,
                        "median_ms": 1000 * statistics.median(seen.took_s),
                        "held": sum(took_s > HELD_S for took_s in seen.took_s),
                        "slowest_s": max(seen.took_s),
                        "streams": sum(seen.streams.values()),
                        "cut": sum(seen.streams.values()) - seen.streams["whole"],
                    }
                )
    return found


def faults(engine: Any, images: Any) -> list[dict[str, Any]]:
    """How soon each fault was seen and was over, several times each; the medians and the longest."""
    from faults import (
        SERVICES,
        database_death_then_whole,
        database_fault_then_whole,
        death_of_all_then_whole,
        fault_then_whole,
        main_stack,
        postgres_stack,
    )

    took: dict[str, list[Any]] = {}

    def add(one: Any) -> None:
        took.setdefault(one.what, []).append(one)

    with tempfile.TemporaryDirectory() as folder, main_stack(engine, images, Path(folder)) as stack:
        for _ in range(FAULT_ROUNDS):
            for fault in ("kill", "pause", "partition"):
                for service in SERVICES:
                    add(fault_then_whole(stack, fault, service))
            add(death_of_all_then_whole(stack))
    with tempfile.TemporaryDirectory() as folder, postgres_stack(engine, images, Path(folder)) as stack:
        for _ in range(FAULT_ROUNDS):
            for fault in ("down", "pause", "partition"):
                add(database_fault_then_whole(stack, fault)[0])
            add(database_death_then_whole(stack))
    return [
        {"what": what}
        | {name: statistics.median(getattr(one, name) for one in all_of) for name in FAULT_FIGURES}
        | {"longest_s": max(one.writes_s for one in all_of)}
        for what, all_of in took.items()
    ]


def measure(parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """The figures of these parts; those of the images by target."""
    from engine import running, start, stop
    from images import Images

    before = running()
    engine = start()
    try:
        images = Images(engine)
        figures: dict[str, Any] = {}
        if "images" in parts:
            figures["rebuild_s"] = rebuild_s()
            for target in ("platform", "agentdb", "swarm"):
                figures[target] = service_figures(engine, target, images(target), ())
            with postgres(engine, f"af-bench-{secrets.token_hex(4)}") as database:
                url = DATABASE.format(host=database)
                stores = tuple(
                    f"--env=AGENTIC_FLOW_{section}__DATABASE_URL={url}" for section in ("SWARM", "AGENTDB")
                )
                options = (f"--network={database.removesuffix('-db')}", *stores)
                figures["worker"] = service_figures(engine, "worker", images("worker"), options)
        if "upgrades" in parts:
            figures["upgrades"] = upgrades(engine, images)
        if "faults" in parts:
            figures["faults"] = faults(engine, images)
        return figures
    finally:
        if before is None:
            stop()


def fault_row(own: dict[str, Any]) -> str:
    """A row of the section."""
    figures = " | ".join(f"{own[name]:.1f}" for name in (*FAULT_FIGURES, "longest_s"))
    return f"| {own['what']} | {figures} |"


def upgrade_row(own: dict[str, Any]) -> str:
    """A row of the section."""
    version = "good" if own["good"] else "bad, taken back"
    store = {"postgresql": "PostgreSQL", "directory": "folders"}[own["store"]]
    pause = "none" if not own["pause_s"] else f"{own['pause_s']:.1f}"
    return (
        f"| {store} | {version} | {own['took_s']:.0f} | {own['requests']} | {own['failed']} | {own['held']} "
        f"| {own['median_ms']:.0f} | {own['slowest_s']:.1f} | {own['streams']} | {own['cut']} | {pause} |"
    )


def section() -> str:
    """The section of RESULTS.md."""
    from traffic import RATE_PER_S
    from upgrades import STREAM_S

    figures = measure()
    rows = []
    for target, limit_mb in LIMITS_MB.items():
        own = figures[target]
        rows.append(
            f"| {target} | {own['added_mb']:.0f} (≤ {limit_mb}) | {own['ready_s']:.1f} "
            f"| {own['memory_mb']:.0f} | {own['probe_ms']:.0f} |"
        )
    return "\n".join(
        [
            f"Targets: ready within {READY_TARGET_S} s, a rebuild after a change of the source within "
            f"{REBUILD_TARGET_S} s, a health check under {PROBE_TARGET_MS} CPU ms.",
            "",
            "| image | MB that it adds to its base | s from `docker run` to ready "
            "| MB private memory, idle | CPU ms of a health check |",
            "|---|---|---|---|---|",
            *rows,
            "",
            f"One changed line of the source is in an image after {figures['rebuild_s']:.1f} s (median of "
            f"{REBUILDS}). Starts are medians of {STARTS}.",
            "",
            f"Another version of a whole stack under {RATE_PER_S:.0f} requests/s, each fifth a write, and a "
            f"stream of {STREAM_S:.0f} s each second. Held are requests that took more than {HELD_S:.0f} s; "
            "what the proxy could not hold until it was over counts as failed.",
            "",
            "| store | version | s, the whole upgrade | requests | failed | held | ms median | s slowest "
            "| streams | cut | s pause told |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *map(upgrade_row, figures["upgrades"]),
            "",
            "Faults, each under writes and with runs accepted, none of which was lost. Targets: seen on the "
            f"health routes within {SEEN_TARGET_S} s, over within {HEALED_TARGET_S} s of its cause's end. "
            f"Medians of {FAULT_ROUNDS}. What is killed the engine starts again at once; what is down was "
            "killed by hand, and is started again when all have seen it.",
            "",
            "| fault | s until seen | s from its end until ready | until writes are taken | the longest |",
            "|---|---|---|---|---|",
            *map(fault_row, figures["faults"]),
            "",
            "`python benchmarks/containers.py`",
        ]
    )


def main() -> int:
    """Print the section, or with `--json` the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--only", choices=PARTS, help="of a part, as JSON")
    given = parser.parse_args()
    if given.json or given.only:
        print(json.dumps(measure((given.only,) if given.only else PARTS), indent=1))
    else:
        print(section())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
