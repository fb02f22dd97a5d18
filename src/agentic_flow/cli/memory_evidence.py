"""`agentic-flow memory uplift|verify|import|plot`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agentic_flow.cli.memory_session import TenantOption, counted, on_memory
from agentic_flow.cli.session import Session, command

if TYPE_CHECKING:
    from agentic_flow.memory.certificates import Verification
    from agentic_flow.memory.importing import ImportReport
    from agentic_flow.memory.uplift import Estimate, UpliftReport


def register(app: typer.Typer) -> None:
    """Give the commands their places."""
    command(app, "uplift", examples=("agentic-flow memory uplift", "agentic-flow memory uplift ITEM --json"))(
        uplift
    )
    command(app, "verify", examples=("agentic-flow memory verify", "agentic-flow memory verify RECALL"))(
        verify
    )
    command(
        app,
        "import",
        examples=(
            "agentic-flow memory import .swarm/memory.db",
            "agentic-flow memory import agentdb-export.json --learn",
        ),
    )(import_file)
    command(
        app,
        "plot",
        examples=(
            "agentic-flow memory plot memory.svg",
            "agentic-flow memory plot success.png --show success --overwrite",
        ),
    )(plot)


def uplift(
    session: Session,
    item: Annotated[str | None, typer.Argument(help="Only this item. [default: all]", metavar="ITEM")] = None,
    tenant: TenantOption = None,
) -> None:
    """Show what items do: success of runs that were shown them against runs they were kept from by chance.

    That takes memory.withheld_share above 0. Comparing runs that used an item with runs that did not is
    observational: it is shown apart and proves nothing, for an agent chooses what it uses.
    """
    report = on_memory(session, tenant, lambda memory, who: memory.uplift(who, item_id=item))
    held_back = session.settings.memory.withheld_share
    session.show(report, lambda: _print_uplift(report, held_back))


def _print_uplift(report: UpliftReport, held_back: float) -> None:
    from agentic_flow.cli.output import print_table, talk

    print(
        f"{counted(report.recalls, 'recall')} with an outcome, {report.randomised_recalls} of them randomised"
    )
    if report.items:
        print_table(
            ("item", "comparison", "with", "without", "difference", "95 % interval", "finding"),
            [
                (name, *_estimate(estimate))
                for name, estimate in (
                    ("memory as a whole", report.whole),
                    *((one.item_id, one.randomised) for one in report.items),
                    *((one.item_id, one.observational) for one in report.items),
                )
                if estimate.with_n or estimate.without_n
            ],
        )
    if not held_back:
        talk("nothing is kept back now: set memory.withheld_share (0.1, say) to measure what items do")


def _estimate(one: Estimate) -> tuple[object, ...]:
    interval = "-"
    if one.within_low is not None and one.within_high is not None:
        interval = f"{_points(one.within_low)} to {_points(one.within_high)}"
    return (
        one.kind,
        f"{one.with_successes}/{one.with_n}",
        f"{one.without_successes}/{one.without_n}",
        "-" if one.within is None else _points(one.within),
        interval,
        one.finding,
    )


def _points(value: float) -> str:
    return f"{value * 100:+.0f}"


def verify(
    session: Session,
    recall: Annotated[
        str | None,
        typer.Argument(help="Compare the items of this recall only. [default: all]", metavar="RECALL"),
    ] = None,
    tenant: TenantOption = None,
) -> None:
    """Check the chain of recall certificates, and what became of the items since they were shown.

    Exits with 9 when the chain is broken. Items that changed or went are told and are no break. Note the
    head elsewhere: whoever can rewrite the whole database can rewrite the whole chain.
    """
    from agentic_flow.core.errors import DataCorrupted

    found = on_memory(session, tenant, lambda memory, who: memory.verify(who, recall))
    data = {"whole": found.whole, **_plain(found)}
    session.show(data, lambda: _print_verification(found))
    if not found.whole:
        first = found.breaks[0]
        raise DataCorrupted(
            f"the chain of recalls is broken at certificate {first.sequence!r}: {first.problem}",
            hint="somebody changed the database beside the program, or it is damaged: see `db verify`",
        )


def _plain(found: Verification) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(found)


def _print_verification(found: Verification) -> None:
    state = "whole" if found.whole else f"broken in {counted(found.breaks_total, 'place')}"
    pruned = f", {found.pruned} pruned before them" if found.pruned else ""
    print(f"{counted(found.certificates, 'certificate')}{pruned}: the chain is {state}")
    if found.certificates:
        print(f"head {found.last_sequence} {found.head_hash}")
        print(f"items since: {found.same} the same, {found.changed} changed, {found.gone} gone")
    for one in found.breaks[:10]:
        print(f"  broken at {one.sequence}: {one.problem}")
    for check in [found.asked] if found.asked else found.differing[:10]:
        for item in check.items:
            if item.status != "same" or found.asked:
                then = f"revision {item.revision_then}"
                now = f", now {item.revision_now} ({item.state_now})" if item.revision_now else ""
                print(f"  {check.id}: {item.item_id} {item.status}, shown as {then}{now}")


def import_file(
    session: Session,
    file: Annotated[Path, typer.Argument(help="A memory of another program, or an export.", metavar="FILE")],
    learn: Annotated[
        bool, typer.Option("--learn", help="Also distil items from its runs; else they are only kept.")
    ] = False,
    tenant: TenantOption = None,
) -> None:
    """Take in another memory, and report what was taken and what was not, with the reasons.

    Knows `.swarm/memory.db` of ReasoningBank ports, databases and JSON exports of the npm package agentdb,
    and exports of memory.items and memory.trajectories. The file is read whole and checked before anything
    is stored: a damaged one changes nothing. Taking it in again adds nothing. Secrets and personal data that
    are recognised are masked.
    """
    from agentic_flow.memory.importing import read_memory_file

    found = read_memory_file(file, now_s=_now_s())
    report = on_memory(session, tenant, lambda memory, who: memory.take_in(who, found, learn=learn))
    session.show(report, lambda: _print_import(file, report, learn))


def _now_s() -> float:
    from agentic_flow.core.clock import SYSTEM_CLOCK

    return SYSTEM_CLOCK.time_s()


def _print_import(file: Path, report: ImportReport, learn: bool) -> None:
    from agentic_flow.cli.output import print_table

    kinds = {
        "reasoningbank": "a ReasoningBank database",
        "agentdb": "a database of the npm package agentdb",
        "agentdb-json": "an export of the npm package agentdb",
        "export": "an export of ours",
    }
    print(f"{file}: {kinds[report.format]}")
    print(
        f"items         {report.items_added} taken, {report.items_merged} merged into others, "
        f"{report.items_present} here already"
    )
    print(f"runs          {report.trajectories_added} taken, {report.trajectories_present} here already")
    if report.trajectories_added:
        print(
            f"              {'they wait to be learned from' if learn else 'kept; --learn distils from them'}"
        )
    if report.left_out:
        print("left out")
        print_table(("where", "rows", "why"), [(one.where, one.count, one.why) for one in report.left_out])


def plot(
    session: Session,
    file: Annotated[Path, typer.Argument(help="A new .png or .svg.", metavar="FILE")],
    show: Annotated[
        list[str] | None,
        typer.Option(
            "--show",
            help="What to draw; may be repeated. [default: all three]",
            metavar="success|growth|confidence",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    tenant: TenantOption = None,
) -> None:
    """Draw success with and without memory over time, the growth of the bank, and what is believed."""
    from agentic_flow.agentdb.transfer_files import file_errors, replacing
    from agentic_flow.memory import plots

    kind = plots.plot_kind(file)
    plots.figure_class()
    pictures = plots.known_pictures(show or plots.PICTURES)
    series = on_memory(session, tenant, lambda memory, who: memory.series(who))
    with replacing(file, overwrite=overwrite) as part, file_errors(file):
        plots.draw(part, kind, series, pictures)
    session.show(
        {"path": str(file), "pictures": pictures, "series": series},
        lambda: print(
            f"{file}: {', '.join(pictures)}; {counted(series.judged, 'judged run')}, "
            f"{series.growth[-1].items if series.growth else 0} items"
        ),
    )
