"""`agentic-flow models usage`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentic_flow.cli.session import Session, UrlOption, command

if TYPE_CHECKING:
    from agentic_flow.gateway.usage_table import UsageReport, UsageRow

_PLOT_ROWS_MAX = 10_000


def register(app: typer.Typer) -> None:
    """Give the command its place."""
    command(
        app,
        "usage",
        examples=(
            "agentic-flow models usage",
            "agentic-flow models usage --by model,agent --since 7d",
            "agentic-flow models usage --by day --since 2026-11-01 --until 2026-12-01 --csv",
            "agentic-flow models usage --all-tenants --by tenant,model --json",
            "agentic-flow models usage --since 30d --plot usage.png",
            "agentic-flow models usage --url http://127.0.0.1:3000 --by key",
        ),
    )(usage)


def usage(
    session: Session,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="What makes a row: model, provider, agent, run, key, tenant, day, hour, status.",
            metavar="NAMES",
        ),
    ] = "model",
    since: Annotated[
        str, typer.Option("--since", help="7d, 12h, a date or a time; days are UTC.", metavar="TIME")
    ] = "30d",
    until: Annotated[
        str | None, typer.Option("--until", help="The same, not included. [default: now]", metavar="TIME")
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Whose calls. [default: the owner's, or the key's]", metavar="NAME"),
    ] = None,
    all_tenants: Annotated[bool, typer.Option("--all-tenants", help="Everybody's calls.")] = False,
    limit: Annotated[
        int, typer.Option("--limit", help="Most rows; totals are of all.", metavar="N", min=1, max=9999)
    ] = 200,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print the rows as CSV.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw cost per day, by model, into a new .png or .svg.", metavar="FILE"),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            "--measure", help="What --plot draws. [default: cost, or tokens without]", metavar="cost|tokens"
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plot that exists.")] = False,
    url: UrlOption = None,
) -> None:
    """Show what model calls used and cost: from the gateway's usage ledger, not from a provider's bill.

    Reads the database of this machine's settings, or asks a platform that runs elsewhere; the last half
    second of a running gateway may be missing.
    A cost is a sum of known costs: calls without a known price are counted in a column of their own.
    Percentiles are exact, of calls that succeeded.
    """
    from agentic_flow.gateway.usage_table import EVERYBODY
    from agentic_flow.runtime.operations import operations

    settings = session.start()
    _check_options(session, tenant, all_tenants, as_csv, plot, measure)
    whose = EVERYBODY if all_tenants else tenant
    keys = "day,model" if plot is not None else by
    most = _PLOT_ROWS_MAX - 1 if plot is not None else limit
    with operations(settings, url) as place:
        report = place.usage(whose, keys, since, until, most)
    if plot is not None:
        _plot(session, report, plot, measure, overwrite)
    elif as_csv:
        _print_csv(report)
    else:
        session.show(report.as_json(), lambda: _print_report(report))


def _check_options(
    session: Session,
    tenant: str | None,
    all_tenants: bool,
    as_csv: bool,
    plot: Path | None,
    measure: str | None,
) -> None:
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.gateway.usage_plot import plot_kind

    if tenant is not None and all_tenants:
        raise InvalidInput(f"--tenant {tenant!r} and --all-tenants contradict each other", hint="give one")
    if session.as_json and as_csv:
        raise InvalidInput("--json and --csv contradict each other", hint="give one")
    if measure not in (None, "cost", "tokens"):
        raise InvalidInput(f"--measure {measure!r} is none", hint="use cost or tokens")
    if plot is not None:
        plot_kind(plot)


def _print_report(report: UsageReport) -> None:
    from agentic_flow.cli.output import print_table, talk

    if report.totals is None:
        print(_nothing(report))
        return
    rows = [_cells(row, list(row.keys.values())) for row in report.rows]
    if report.by:
        rows.append(_cells(report.totals, ["total", *[""] * (len(report.by) - 1)]))
    print_table(
        (
            *report.by,
            "calls",
            "errors",
            "tokens in",
            "from cache",
            "tokens out",
            "cost",
            "no price",
            "p50",
            "p95",
            "first token p50",
            "p95",
        ),
        rows,
    )
    if report.truncated:
        talk(f"more groups are not shown: the first {len(report.rows)} are; give --limit")
    if report.totals.unpriced:
        talk(f"{report.totals.unpriced} calls have no known price and are not in the cost")


def _cells(row: UsageRow, keys: list[str]) -> tuple[object, ...]:
    return (
        *keys,
        row.calls,
        row.errors,
        f"{row.input_tokens:,}",
        f"{row.cache_read_tokens:,}",
        f"{row.output_tokens:,}",
        _dollars(row.cost_usd),
        row.unpriced,
        *map(_seconds, (row.latency_p50_s, row.latency_p95_s, row.first_token_p50_s, row.first_token_p95_s)),
    )


def _dollars(cost_usd: float | None) -> str:
    """As many digits as tell a small cost from none."""
    from agentic_flow.cli.output import money

    if cost_usd is None or cost_usd == 0 or cost_usd >= 0.01:
        return money(cost_usd)
    return f"${cost_usd:.9f}".rstrip("0")


def _seconds(duration_s: float | None) -> str | None:
    return None if duration_s is None else f"{duration_s:.2f} s"


def _nothing(report: UsageReport) -> str:
    from agentic_flow.cli.output import local_time

    whose = "of any tenant" if report.tenant is None else f"of tenant {report.tenant!r}"
    span = f"from {local_time(report.since_s)} to {local_time(report.until_s)}"
    return f"no model call {whose} is recorded {span}"


def _print_csv(report: UsageReport) -> None:
    import csv
    import sys

    from agentic_flow.gateway.usage_table import NUMBERS

    writer = csv.DictWriter(sys.stdout, [*report.by, *NUMBERS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_json() for row in report.rows)
    if report.truncated:
        from agentic_flow.cli.output import talk

        talk(f"more groups are not printed: the first {len(report.rows)} are; give --limit")


def _plot(session: Session, report: UsageReport, path: Path, measure: str | None, overwrite: bool) -> None:
    from agentic_flow.agentdb.transfer_files import file_errors, replacing
    from agentic_flow.cli.output import talk
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.gateway import usage_plot

    usage_plot.figure_class()
    totals = report.totals
    if totals is None:
        talk(f"{_nothing(report)}: nothing is drawn")
        session.show({"path": None, "calls": 0}, lambda: None)
        return
    if report.truncated:
        raise InvalidInput(
            f"more than {len(report.rows)!r} days and models", hint="narrow it by --since and --until"
        )
    chosen: Any = measure or ("cost" if totals.cost_nano_usd else "tokens")
    drawn = usage_plot.daily_series(report.rows, chosen)
    whose = "all tenants" if report.tenant is None else f"tenant {report.tenant}"
    amount = totals.cost_nano_usd / usage_plot.NANO
    if chosen == "tokens":
        amount = totals.input_tokens + totals.output_tokens
    subtitle = f"{whose} · {totals.calls:,} calls · {usage_plot.amount_text(amount, chosen)} in all"
    if chosen == "cost" and totals.unpriced:
        subtitle += f" · {totals.unpriced:,} calls without a known price are not in it"
    with replacing(path, overwrite=overwrite) as part, file_errors(path):
        usage_plot.draw(part, usage_plot.plot_kind(path), drawn, subtitle=subtitle)
    session.show(
        {
            "path": str(path),
            "measure": chosen,
            "calls": totals.calls,
            "days": len(drawn.days),
            "models": list(drawn.series),
        },
        lambda: print(f"{path}: {chosen} by day and model, {drawn.days[0]} to {drawn.days[-1]}"),
    )
