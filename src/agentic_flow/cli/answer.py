"""How a run is printed: the answer, its citations, and the table of what it took."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from agentic_flow.cli.output import console, money, print_table

if TYPE_CHECKING:
    from agentic_flow.swarm.runs import RunMemory, RunResult, RunStep

_QUOTE_LINES_MAX = 6
_NAMES_MAX = 10


def print_result(result: RunResult) -> None:
    """The whole run on stdout."""
    from rich.text import Text

    out = console()
    if result.answer:
        out.print(Text(result.answer.rstrip()))
    if result.citations:
        out.print(Text("\nEvidence", style="bold"))
        for number, citation in enumerate(result.citations, start=1):
            out.print(Text.assemble((f"{number:>2}. ", "dim"), (citation.label, "cyan")))
            lines = citation.quote.splitlines()
            for line in lines[:_QUOTE_LINES_MAX]:
                out.print(Text(f"      {line}".rstrip(), style="dim"))
            if len(lines) > _QUOTE_LINES_MAX:
                out.print(Text(f"      … {len(lines) - _QUOTE_LINES_MAX} more lines", style="dim"))
    out.print()
    _print_table(result)
    for note in result.notes:
        out.print(Text(f"note: {note}", style="dim"))


def _print_table(result: RunResult) -> None:
    rows = [
        (agent.name, agent.role, agent.state, agent.steps, *_usage(agent.usage)) for agent in result.agents
    ]
    total = (
        f"total: {len(result.agents)} agents",
        "",
        result.state,
        sum(agent.steps for agent in result.agents),
        *_usage(result.usage),
    )
    headers = ("agent", "role", "state", "steps", "tool calls", "tokens", "cost", "time")
    print_table(headers, [*rows, total])
    for agent in result.agents:
        if agent.error is not None:
            sys.stdout.write(f"{agent.name} failed: {agent.error}\n")
            sys.stdout.write(f"  hint: {agent.hint}\n" if agent.hint else "")
    queue = f", queue {result.queue}" if result.queue is not None else ""
    after = f", after {', '.join(result.after)}" if result.after else ""
    retry = f", retry of {result.retry_of}" if result.retry_of is not None else ""
    about = f"{result.topology}, model {result.model}{queue}{after}{retry}"
    sys.stdout.write(f"run {result.run_id} ({result.state}), {about}\n")
    if result.ingest is not None:
        report = result.ingest
        skipped = {
            name.removeprefix("skipped_").replace("_", " "): count
            for name, count in report.model_dump().items()
            if name.startswith("skipped_") and count
        }
        read = f"read {report.added + report.changed} files, {report.unchanged} unchanged"
        left_out = ", ".join(f"{count} {why}" for why, count in skipped.items())
        sys.stdout.write(f"{read}{f'; skipped {left_out}' if left_out else ''}\n")
    if result.artifacts:
        names = ", ".join(f"{one.name} ({one.size_bytes:,} bytes)" for one in result.artifacts[:_NAMES_MAX])
        more = len(result.artifacts) - _NAMES_MAX
        sys.stdout.write(f"artifacts: {names}{f' and {more} more' if more > 0 else ''}\n")
    if result.memory is not None:
        sys.stdout.write(f"memory: {_memory(result.memory)}\n")
    sys.stdout.flush()


def _memory(had: RunMemory) -> str:
    """What the run had from memory, in words: how much, which, and what of it was used."""
    if not had.asked:
        return "not used (--no-memory, or memory.enabled is off)"
    parts = [
        f"{len(found)} {one if len(found) == 1 else many} ({', '.join(entry.id for entry in found)})"
        for found, one, many in (
            (had.notes, "note", "notes"),
            (had.tries, "earlier try", "earlier tries"),
        )
        if found
    ]
    if not parts:
        return "nothing that is kept fits the goal"
    had_what = " and ".join(parts)
    if not had.given:
        return f"{had_what} would fit; a model that only selects passages is not given any"
    return f"the agents were given {had_what}; they cited {', '.join(had.cited) or 'none'}"


def _usage(usage: object) -> tuple[object, ...]:
    from agentic_flow.swarm.runs import RunUsage

    assert isinstance(usage, RunUsage)
    return (
        usage.tool_calls,
        usage.input_tokens + usage.output_tokens,
        money(usage.cost_usd),
        f"{usage.time_s:.1f} s",
    )


def print_steps(steps: Sequence[RunStep]) -> None:
    """Every recorded step, one line each; of model calls what they consumed."""
    sys.stdout.write("\n")
    print_table(
        ("#", "agent", "step", "took", "tokens", "cost", "outcome"),
        [_step_row(number, step) for number, step in enumerate(steps, start=1)],
    )


def _step_row(number: int, step: RunStep) -> tuple[object, ...]:
    took = f"{step.completed_at_s - (step.started_at_s or 0):.2f} s" if step.completed_at_s else "-"
    tokens = cost = ""
    if (usage := step.usage) is not None:
        tokens = f"{usage.input_tokens + usage.output_tokens:,}"
        cost = "no price" if usage.cost_usd is None else f"${usage.cost_usd:.4f}"
    outcome = str(step.error.get("detail", "failed")) if step.error else "ok"
    return number, step.agent, step.name, took, tokens, cost, outcome
