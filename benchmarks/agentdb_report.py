"""The AgentDB section of RESULTS.md: targets beside what was measured, peers, and where a peer is ahead.

Everything is derived from the figures that `agentdb.py` keeps; nothing is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agentdb
from agentdb_peers.child import OURS, PEERS

MILLION_TITLE = "AgentDB at 1,000,000 rows"
TITLE = "AgentDB beside its peers"
SCAN, GRAPH, AUTO = "agentdb scan", "agentdb graph", "agentdb auto"
BARE = ("hnswlib", "turbovec", "numpy")
MB = 1e6
KIND_TITLES = {
    "all": "unfiltered",
    "tenth": "filter keeping 10 %",
    "hundredth": "filter keeping 1 %",
    "tenant": "tenant with 1 % of the rows",
}

INTRO = """{rows:,} × 384 in {clusters:,} clusters (a row is its centre + 0.6 × noise, both standard
normal, made a unit vector; seed in `agentdb_peers/rows.py`), {queries} queries that are no rows, k = 10,
exact answers by numpy. Texts are ten words, attributes follow from a row's number. Each system is a
process of its own with one thread where that can be set; CPU time is of all its threads, for pgvector of
client and server. Queries return id, text and metadata, except from the bare libraries (hnswlib,
turbovec, numpy), which give numbers of rows alone. Rounds of the systems alternate; medians; the first
round, in which filters and caches are new, is left out and shown apart. Ours take float16 rows, peers
float32. The machine was shared: CPU milliseconds are inflated alike for all, ratios count.

{machine}"""


WHY = """What is known of the figures that are not reached (run of 2026-11-29):

- CPU per query: the run's milliseconds are those of a slow, shared machine (the factor is stated above). On
  the scan tier the bare scan of the codes would be most of it, since turbovec's takes some ten times as long
  without AVX-512; sketches stand before it for that reason, but not under filters. On the graph tier and for
  the small tenant the library takes a third; the rest is one read transaction that checks the namespace and
  reads every hit again, and building the answer.
- Opening reads the whole index file and checks its sums.
- Filters that are asked for the first time read every row's metadata: there is no index on it yet.
- Filters that keep many rows are scanned under an allow-list, which takes its time."""

MILLION_WHY = """\
The graph's beam is measured again as the graph grows; a run before that was so reached .916. A filter that
keeps many rows is scanned under an allow-list, which at this size takes long: numpy, with the rows in memory,
is about as fast at 10 % and far faster at 1 %."""


@dataclass(frozen=True)
class Target:
    """One promise.

    Args:
        what: The property.
        reach: The promise in words.
        shown: What was measured, in words.
        reached: Whether it holds; None when it was not measured.
    """

    what: str
    reach: str
    shown: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        return {True: "reached", False: "**not reached**", None: "not measured"}[self.reached]


class Figures:
    """What was measured, by part, system and path; None where nothing was."""

    def __init__(self, found: dict[str, Any]) -> None:
        self.found = found

    def get(self, part: str, system: str, *path: str) -> Any:
        at: Any = self.found.get(part, {}).get(system)
        for name in path:
            if not isinstance(at, dict) or name not in at:
                return None
            at = at[name]
        return at

    def failure(self, part: str, system: str) -> str | None:
        """Why the system has no figures there."""
        return self.get(part, system, "failed")

    def systems(self, part: str) -> list[str]:
        """Who was measured, ours first."""
        return [name for name in (*OURS, *PEERS) if name in self.found.get(part, {})]


def read_figures(folder: Path = agentdb.FOLDER) -> dict[str, Any]:
    """The figures kept in the folder; none, if nothing was measured."""
    path = folder / "figures.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def section(kept: bool, folder: Path = agentdb.FOLDER) -> str:
    """The section's text.

    Args:
        kept: Take the figures that are there instead of measuring everything.
        folder: Where they are kept.
    """
    if not kept:
        run = agentdb.Run(folder, agentdb.SYSTEMS)
        for name, part in agentdb.PARTS.items():
            if name != "million":
                part(run)
    return text_of(Figures(read_figures(folder)))


def million_section(kept: bool, folder: Path = agentdb.FOLDER) -> str:
    """The text of the section of 1,000,000 rows, which takes most of an hour; arguments as `section`."""
    if not kept:
        agentdb.million(agentdb.Run(folder, agentdb.SYSTEMS))
    return million_text_of(Figures(read_figures(folder)))


def million_text_of(figures: Figures) -> str:
    """That section's text from figures."""
    target = _million_target(figures)
    parts = [
        "The same kind of rows, ten times as many, as one run of its own.",
        _table(
            ("property", "to reach", "measured", ""),
            [(target.what, target.reach, target.shown, target.verdict)],
        ),
        _million(figures),
        _speedups(figures, (("million", "1,000,000"),)),
        MILLION_WHY,
        _when(figures, ("million",)),
        "`python benchmarks/report.py --only million`; with `--kept` after "
        "`python benchmarks/agentdb.py --part million`.",
    ]
    return "\n\n".join(parts)


def text_of(figures: Figures) -> str:
    """The section's text from figures."""
    rows = figures.get("build", SCAN, "rows") or agentdb.ROWS
    parts = [
        INTRO.format(
            rows=rows, clusters=max(rows // 100, 1), queries=agentdb.QUERIES, machine=_machine(figures)
        ),
        "### Targets",
        _table(
            ("property", "to reach", "measured", ""),
            [(one.what, one.reach, one.shown, one.verdict) for one in targets(figures)],
        ),
        WHY,
        "### Where a peer is ahead",
        _ahead_text(figures),
        "### Searches: recall@10 and CPU ms per query",
        _searches(figures),
        "### Building, disk and opening",
        _building(figures),
        "### Durable upserts, with index and full text",
        _upserts(figures),
        "### Speed-up over a linear scan",
        _speedups(figures, (("small", "10,000"), ("search", "100,000"))),
        "### How each was set up",
        _setups(figures),
        _when(figures, ("build", "search", "reopen", "upsert", "small")),
        "`make bench-agentdb`, or parts of it: `python benchmarks/agentdb.py --part search --system zvec …`",
    ]
    return "\n\n".join(part for part in parts if part)


def _machine(figures: Figures) -> str:
    machine = figures.found.get("machine", {})
    flags = machine.get("flags")
    if flags is None:
        return ""
    hnswlib = figures.get("search", "hnswlib", "all", "cpu_ms")
    scale = (
        f" hnswlib, bare, takes {hnswlib:.3f} ms here; the quiet machine that the targets were set on "
        f"took .065, so this run's milliseconds are about {hnswlib / 0.065:.1f} times its own."
        if hnswlib
        else ""
    )
    known = "with" if "avx512" in flags else "without"
    hint = (
        ""
        if "avx512" in flags
        else " (turbovec, which scans for AgentDB, has its fast kernels for AVX-512 only)"
    )
    return f"The processor is one {known} AVX-512{hint}.{scale}"


# Targets


def targets(figures: Figures) -> Iterator[Target]:
    """Every promise with its figure."""
    get = figures.get
    for tier, system, floor in (("scan", SCAN, 0.995), ("graph", GRAPH, 0.99)):
        recall = get("search", system, "all", "recall")
        yield _least(f"recall@10, unfiltered, {tier} tier", recall, floor, "{:.4f}")
    for tier, system in (("scan", SCAN), ("graph", GRAPH)):
        for kind in ("tenth", "hundredth"):
            found = get("search", system, kind)
            what = f"recall@10, {KIND_TITLES[kind]}, {tier} tier"
            if found is None:
                yield Target(what, "at least 0.995, always k rows", "", None)
                continue
            shown = f"{found['recall']:.4f}, {_always(found)}"
            held = found["recall"] >= 0.995 and not found["short"]
            yield Target(what, "at least 0.995, always k rows", shown, held)
    for tier, system, most in (("scan", SCAN, 0.6), ("graph", GRAPH, 0.2)):
        cpu_ms = get("search", system, "all", "cpu_ms")
        yield _most(f"CPU ms per query, unfiltered, {tier} tier", cpu_ms, most, "{:.3f}")
    for tier, system in (("scan", SCAN), ("graph", GRAPH)):
        cpu_ms = get("search", system, "tenant", "cpu_ms")
        yield _most(
            f"CPU ms per query, {KIND_TITLES['tenant']} (database of the {tier} tier)", cpu_ms, 0.15, "{:.3f}"
        )
    rows = get("build", SCAN, "rows") or agentdb.ROWS
    yield _most(
        "index rebuild, scan tier, CPU s per 100k",
        _per_100k(get("build", SCAN, "rebuild", "cpu_s"), rows),
        2,
        "{:.2f}",
    )
    yield from _upsert_targets(figures)
    for tier, system, index_mb, total_mb in (("scan", SCAN, 25, 130), ("graph", GRAPH, 130, 240)):
        for what, key, most in (("index", "index_bytes", index_mb), ("total", "total_bytes", total_mb)):
            size = get("build", system, key)
            yield _most(
                f"{what} on disk, {tier} tier, MB", None if size is None else size / MB, most, "{:.1f}"
            )
    for tier, system in (("scan", SCAN), ("graph", GRAPH)):
        ours, zvec = (get("reopen", name, "wall_s") for name in (system, "zvec"))
        what, reach = f"reopen to first query, {tier} tier", "at most a third of zvec's"
        if ours is None or zvec is None:
            yield Target(what, reach, "", None)
        else:
            yield Target(what, reach, f"{ours:.3f} s; zvec {zvec:.3f} s", ours <= zvec / 3)


def _upsert_targets(figures: Figures) -> Iterator[Target]:
    for system in (SCAN, GRAPH):
        for kind, name, times in (("single", "singly", (5, 10)), ("batch", "in batches of 100", (2, 5))):
            for peer, least in zip(("qdrant-edge", "zvec"), times, strict=True):
                ours, theirs = (figures.get("upsert", one, kind, "per_s") for one in (system, peer))
                what, reach = f"durable upsert {name}, {system[8:]} tier", f"at least {least} × {peer}"
                if ours is None or theirs is None:
                    yield Target(what, reach, "", None)
                else:
                    shown = f"{ours / theirs:.1f} × ({ours:,.0f} against {theirs:,.0f} rows/s)"
                    yield Target(what, reach, shown, ours >= least * theirs)


def _million_target(figures: Figures) -> Target:
    what, reach = "1,000,000 × 384", "recall at least 0.95 within 6 GB of memory"
    found = figures.get("million", AUTO)
    if not found or "failed" in found:
        return Target(what, reach, "", None)
    peak_gb = found["facts"]["peak_rss_mb"] / 1000
    recall = found["all"]["recall"]
    return Target(what, reach, f"{recall:.4f}, {peak_gb:.2f} GB at most", recall >= 0.95 and peak_gb <= 6)


def _least(what: str, found: float | None, least: float, form: str) -> Target:
    if found is None:
        return Target(what, f"at least {least}", "", None)
    return Target(what, f"at least {least}", form.format(found), found >= least)


def _most(what: str, found: float | None, most: float, form: str) -> Target:
    if found is None:
        return Target(what, f"at most {most}", "", None)
    return Target(what, f"at most {most}", form.format(found), found <= most)


def _per_100k(value: float | None, rows: int) -> float | None:
    return None if value is None else value * 100_000 / rows


def _always(found: dict[str, Any]) -> str:
    return (
        "always k rows"
        if not found["short"]
        else f"fewer than k rows in {found['short']} of {found['queries']:.0f}"
    )


# Where a peer is ahead


def _ahead_text(figures: Figures) -> str:
    peers = [
        name for name in figures.systems("search") if name in PEERS and not figures.failure("search", name)
    ]
    if not peers:
        return "No peer was measured."
    return "\n".join(_ahead(figures)) or f"Nowhere, against {', '.join(peers)}."


def _ahead(figures: Figures) -> Iterator[str]:
    """For each property the peers whose figure is better than the better of our two tiers."""
    for kind, title in KIND_TITLES.items():

        def cpu_ms(figures: Figures, system: str, kind: str = kind) -> float | None:
            return figures.get("search", system, kind, "cpu_ms")

        def recall(figures: Figures, system: str, kind: str = kind) -> float | None:
            return figures.get("search", system, kind, "recall")

        def with_recall(figures: Figures, system: str, kind: str = kind) -> str:
            return f"recall {figures.get('search', system, kind, 'recall'):.3f}"

        yield from _ahead_in(figures, f"CPU per query, {title}", cpu_ms, "ms", note=with_recall)
        yield from _ahead_in(figures, f"recall, {title}", recall, "", most=True)
    yield from _ahead_in(figures, "CPU of building", _build_cpu_s, "s")
    yield from _ahead_in(figures, "size on disk", lambda f, s: _mb(f.get("build", s, "total_bytes")), "MB")
    yield from _ahead_in(figures, "reopen to first query", lambda f, s: f.get("reopen", s, "wall_s"), "s")
    for kind, name in (("single", "singly"), ("batch", "in batches of 100")):

        def per_s(figures: Figures, system: str, kind: str = kind) -> float | None:
            return figures.get("upsert", system, kind, "per_s")

        yield from _ahead_in(figures, f"durable upserts {name}", per_s, "rows/s", most=True)


def _ahead_in(
    figures: Figures,
    title: str,
    value: Callable[[Figures, str], float | None],
    unit: str,
    *,
    most: bool = False,
    note: Callable[[Figures, str], str] | None = None,
) -> Iterator[str]:
    measured = {name: found for name in (SCAN, GRAPH, *PEERS) if (found := value(figures, name)) is not None}
    ours = [(found, name) for name, found in measured.items() if name in OURS]
    if not ours:
        return
    best, tier = max(ours) if most else min(ours)
    ahead: list[str] = []
    for name, found in measured.items():
        if name in PEERS and (found > best if most else found < best):
            more = f", {note(figures, name)}" if note else ""
            bare = ", bare" if name in BARE else ""
            ahead.append(f"{name} ({_number(found)}{' ' if unit else ''}{unit}{more}{bare})")
    if ahead:
        yield f"- {title} ({tier} {_number(best)}{' ' if unit else ''}{unit}): {', '.join(ahead)}."


# Tables


def _searches(figures: Figures) -> str:
    lines = []
    for name in figures.systems("search"):
        if failure := figures.failure("search", name):
            lines.append((name, f"failed: {failure}", *[""] * 7))
            continue
        cells: list[str] = []
        for kind in KIND_TITLES:
            found = figures.get("search", name, kind)
            if found is None:
                cells += ["", ""]
                continue
            short = f" ({_always(found)})" if found["short"] else ""
            first = f" ({found['first_cpu_ms']:.2f})" if kind in ("tenth", "hundredth") else ""
            cells += [f"{found['recall']:.4f}{short}", f"{found['cpu_ms']:.3f}{first}"]
        lines.append((name, *cells))
    heads = ("system", *(cell for title in KIND_TITLES.values() for cell in (title, "CPU ms")))
    return f"{_table(heads, lines)}\n\nIn brackets: the round in which filters are asked for the first time."


def _building(figures: Figures) -> str:
    lines = []
    for name in figures.systems("build"):
        if failure := figures.failure("build", name):
            lines.append((name, f"failed: {failure}", *[""] * 7))
            continue
        get = figures.get
        lines.append(
            (
                name,
                _number(get("build", name, "load", "cpu_s")),
                _number(get("build", name, "build", "cpu_s")),
                _number(get("build", name, "rebuild", "cpu_s")),
                _number(_mb(get("build", name, "index_bytes"))),
                _number(_mb(get("build", name, "total_bytes"))),
                _number(get("build", name, "import_cpu_s")),
                _number(get("reopen", name, "wall_s")),
                _number(get("reopen", name, "cpu_s")),
            )
        )
    heads = (
        "system", "load CPU s", "then index CPU s", "index again CPU s", "index MB", "total MB",
        "import CPU s", "open to first answer s", "CPU s",
    )  # fmt: skip
    note = (
        "Opened in a fresh process with the file cache warm, imports apart. Where index and load are one, "
        "the load holds both. MB are 10⁶ bytes of disk."
    )
    return f"{_table(heads, lines)}\n\n{note}"


def _upserts(figures: Figures) -> str:
    lines = []
    for name in figures.systems("upsert"):
        if failure := figures.failure("upsert", name):
            lines.append((name, f"failed: {failure}", "", "", "", ""))
            continue
        cells = []
        for kind in agentdb.BATCHES:
            found = figures.get("upsert", name, kind) or {}
            cells += [_number(found.get("per_s")), _number(found.get("cpu_ms"))]
        durability = figures.get("upsert", name, "durability") or ""
        lines.append((name, *cells, durability))
    heads = (
        "system",
        "singly, rows/s",
        "CPU ms per row",
        "by 100, rows/s",
        "CPU ms per row",
        "when it returns",
    )
    note = (
        "New databases, one caller, short rounds in turn on the same disk. CPU per row includes what a write "
        "leaves to the background (for AgentDB, the index brought up to date and its file written). "
        "Sync calls were counted by strace."
    )
    return f"{_table(heads, lines)}\n\n{note}"


def _speedups(figures: Figures, parts: Sequence[tuple[str, str]]) -> str:
    lines = []
    for part, rows in parts:
        linear = {name: figures.get(part, name, "all", "cpu_ms") for name in agentdb.LINEAR}
        for name in (SCAN, GRAPH, AUTO, *PEERS):
            found = figures.get(part, name, "all")
            if not found or (name in PEERS and part != "search" and name not in agentdb.LINEAR):
                continue
            times = [f"{by / found['cpu_ms']:,.1f} ×" if by else "" for by in linear.values()]
            lines.append((rows, name, f"{found['recall']:.4f}", f"{found['cpu_ms']:.3f}", *times))
    return _table(("rows", "system", "recall@10", "CPU ms", "numpy's scan", "SQLite row by row"), lines)


def _million(figures: Figures) -> str:
    found = figures.get("million", AUTO)
    if not found:
        return "Not measured."
    if "failed" in found:
        return f"Failed: {found['failed']}"
    load, built = found["load"], found["build"]
    filters = "; ".join(
        f"{KIND_TITLES[kind]}: recall {found[kind]['recall']:.4f}, {_always(found[kind])}, "
        f"{found[kind]['cpu_ms']:.2f} CPU ms"
        for kind in ("tenth", "hundredth")
        if found.get(kind)
    )
    return (
        f"Settings as they come; tier {found['facts']['tier of tenant whole']}. Loaded in durable batches of "
        f"1,000 in {load['wall_s']:,.0f} s ({load['cpu_s']:,.0f} CPU s, "
        f"{found['rows'] / load['wall_s']:,.0f} rows/s), the index complete after "
        f"{built['wall_s']:,.0f} s more ({built['cpu_s']:,.0f} CPU s). Unfiltered: recall "
        f"{found['all']['recall']:.4f}, {found['all']['cpu_ms']:.3f} CPU ms per query; {filters}. Index "
        f"{found['index_bytes'] / MB:,.0f} MB, total {found['total_bytes'] / MB:,.0f} MB, peak memory "
        f"{found['facts']['peak_rss_mb']:,.0f} MB, open to first answer {found['first']['wall_s']:.1f} s."
    )


def _setups(figures: Figures) -> str:
    return "\n".join(
        f"- {name}: {about}"
        for name in figures.systems("build")
        if (about := figures.get("search", name, "about") or figures.get("build", name, "about"))
    )


def _when(figures: Figures, parts: Sequence[str]) -> str:
    words = []
    for part in parts:
        by_system = figures.found.get(part)
        if not by_system:
            continue
        at = sorted(one["at"] for one in by_system.values())
        loads = [one["load_average"] for one in by_system.values()]
        words.append(
            f"{part} {at[0][:16]} to {at[-1][:16]} UTC, load average {min(loads):.1f} to {max(loads):.1f}"
        )
    return f"Measured: {'; '.join(words)}." if words else "Nothing was measured yet."


def _mb(size: float | None) -> float | None:
    return None if size is None else size / MB


def _build_cpu_s(figures: Figures, system: str) -> float | None:
    load, built = (figures.get("build", system, part, "cpu_s") for part in ("load", "build"))
    return None if load is None or built is None else load + built


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _table(heads: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    rule = "|" + "---|" * len(heads)
    return "\n".join(
        ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]
    )
