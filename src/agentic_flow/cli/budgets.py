"""`agentic-flow budgets show|workers|reconcile`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agentic_flow.cli.session import Session, UrlOption, command, new_app

app = new_app("See what is left of the budgets, and close the books of dead workers.")


@command(
    app, "show", examples=("agentic-flow budgets show", "agentic-flow budgets show --tenant team-a --json")
)
def show(
    session: Session,
    tenant: Annotated[
        str | None,
        typer.Option("--tenant", help="Only this tenant's accounts. [default: all]", metavar="NAME"),
    ] = None,
    url: UrlOption = None,
) -> None:
    """Show the accounts of the budget rules in force, in their current periods, the fullest first.

    An account appears with the first call that is charged to it. Spent is what was settled; reserved is what
    running calls may still cost and what workers hold, so that spent, reserved and left make up the limit.
    """
    from agentic_flow.cli.output import local_time, print_table, talk
    from agentic_flow.runtime.operations import operations

    with operations(session.start(), url) as place:
        found = place.budgets(tenant)

    def human() -> None:
        if not found:
            talk("no account was charged in its current period; `agentic-flow policies show` lists the rules")
            return
        print_table(
            ("rule", "who", "period", "ends", "limit", "spent", "reserved", "left"),
            [
                (
                    _rule(account["rule"]),
                    account["account"],
                    account["rule"]["period"],
                    local_time(account["period_end_s"]) if account["period_end_s"] else "never",
                    *(_dollars(account[f"{name}_nano_usd"]) for name in _AMOUNTS),
                )
                for account in found
            ],
        )

    session.show(found, human)


@command(
    app,
    "workers",
    examples=(
        "agentic-flow budgets workers",
        "agentic-flow budgets workers --url http://127.0.0.1:3000 --json",
    ),
)
def workers(session: Session, url: UrlOption = None) -> None:
    """List the workers that share the budgets: when each was last heard, and what it holds.

    A dead one was silent for so long that it may be reconciled; what it holds is gone for the others until
    then, or until the period ends.
    """
    from agentic_flow.cli.output import print_table, talk
    from agentic_flow.runtime.operations import operations

    with operations(session.start(), url) as place:
        found = place.workers()

    def human() -> None:
        if not found:
            talk("no worker is known: no gateway runs on this database")
            return
        print_table(
            ("worker", "state", "silent", "accounts", "holds at most, of one"),
            [
                (
                    worker.id,
                    "dead" if worker.dead else "alive",
                    f"{worker.silent_s:.1f} s",
                    worker.accounts,
                    _dollars(worker.held_nano),
                )
                for worker in found
            ],
        )

    session.show(found, human)


@command(
    app,
    "reconcile",
    examples=(
        "agentic-flow budgets reconcile --yes",
        "agentic-flow budgets reconcile gw-1-4711-0123456789abcdef --spent-usd 0.25",
    ),
)
def reconcile(
    session: Session,
    worker: Annotated[
        str | None, typer.Argument(help="Id of a dead worker. [default: all of them]", metavar="WORKER")
    ] = None,
    spent_usd: Annotated[
        str | None,
        typer.Option(
            "--spent-usd",
            help="It spent at most this of each account beyond what it settled; the rest is given back. "
            "[default: all that it held]",
            metavar="AMOUNT",
        ),
    ] = None,
    account: Annotated[
        str | None,
        typer.Option(
            "--account", help="Only this account, by its id in `budgets show --json`.", metavar="ID"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    url: UrlOption = None,
) -> None:
    """Close the books of dead workers, and print what was released and what counts as spent.

    What a worker held when it was killed counts as spent, because nobody knows which of its calls the
    provider bills. `models usage` shows what was recorded; --spent-usd gives back the rest. Asks first;
    without a terminal it needs --yes.
    """
    import sys

    from agentic_flow.cli.output import print_table
    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.runtime.operations import operations

    settings = session.start()
    spent_nano = None if spent_usd is None else _nano(spent_usd)
    if not yes:
        whose = "all dead workers" if worker is None else f"worker {worker!r}"
        if not sys.stdin.isatty():
            raise InvalidInput(f"reconciling {whose} needs a yes and there is no terminal", hint="add --yes")
        with operations(settings, url) as place:
            dead = sum(found.dead for found in place.workers())
        typer.confirm(f"Close the books of {whose} ({dead} dead now)?", abort=True, err=True)
    with operations(settings, url) as place:
        done = place.reconcile(worker, spent_nano=spent_nano, account_id=account)

    def human() -> None:
        if not done:
            print("nothing was held by a dead worker")
            return
        print_table(
            ("worker", "account", "counts as spent", "released"),
            [
                (slice.worker_id, slice.account, _dollars(slice.counted_nano), _dollars(slice.released_nano))
                for slice in done
            ],
        )

    session.show(done, human)


_AMOUNTS = ("limit", "spent", "reserved", "left")


def _rule(rule: dict[str, Any]) -> str:
    of = f" of {rule['tenant']}" if rule["tenant"] else ""
    return f"{rule['scope']} {rule['name']}{of}"


def _dollars(nano: int) -> str:
    """Exact: a budget of cents would vanish in rounding."""
    from agentic_flow.gateway.budgets.accounts import usd

    return f"${usd(nano)}"


def _nano(text: str) -> int:
    """Dollars as somebody writes them, in nano-USD."""
    from decimal import Decimal, InvalidOperation

    from agentic_flow.core.errors import InvalidInput
    from agentic_flow.gateway.budgets.accounts import NANO_USD, NANO_USD_MAX

    try:
        nano = Decimal(text) * NANO_USD
        if not nano.is_finite() or not 0 <= nano <= NANO_USD_MAX or nano != nano.to_integral_value():
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidInput(
            f"--spent-usd is {text!r}", hint="give dollars, such as 0.25, with at most nine decimals"
        ) from None
    return int(nano)
