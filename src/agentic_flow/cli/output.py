"""How the command line talks: data on stdout, talk on stderr, colour only where it is welcome.

`NO_COLOR` and streams that are no terminals get plain text; nothing is ever cut to a width there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from agentic_flow.core.errors import AgenticFlowError

_RED, _DIM, _RESET = "\x1b[31m", "\x1b[2m", "\x1b[0m"
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def print_json(data: Any) -> None:
    """One JSON value on stdout; pydantic models, paths and tuples included."""
    import orjson

    options = orjson.OPT_APPEND_NEWLINE | (orjson.OPT_INDENT_2 if sys.stdout.isatty() else 0)
    sys.stdout.write(orjson.dumps(data, default=_jsonable, option=options).decode())
    sys.stdout.flush()


def _jsonable(value: Any) -> Any:
    from pydantic import BaseModel

    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def is_colourful(stream: IO[str]) -> bool:
    """Whether to colour: a terminal, and nobody said no (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def talk(text: str) -> None:
    """A line to the person, not the pipe."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def console(stream: IO[str] | None = None) -> Console:
    """A rich console on `stream` (stdout by default) that never breaks lines outside a terminal."""
    from rich.console import Console

    out: IO[str] = sys.stdout if stream is None else stream
    width = None if out.isatty() else 10_000
    return Console(file=out, width=width, highlight=False, no_color=not is_colourful(out))


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Aligned columns on stdout; numbers to the right."""
    from rich.table import Table

    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for index, header in enumerate(headers):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(_literal(cell) for cell in row))
    out = console()
    with out.capture() as captured:
        out.print(table)
    # Rich pads the last column with blanks; they would only get in the way of pipes.
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    sys.stdout.flush()


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - any sequence is printable


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("$").replace(",", "").replace(".", "", 1).rstrip(" s").isdigit()


def _literal(cell: str) -> Any:
    from rich.text import Text

    return Text(cell)


def local_time(at_s: float | None) -> str:
    """A point in time in the reader's own zone."""
    if not at_s:
        return "-"
    return datetime.fromtimestamp(at_s, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration_of(text: str) -> float:
    """Seconds of an age like 30d, 12h, 90m or 10s.

    Raises:
        InvalidInput: it is none.
    """
    from agentic_flow.core.errors import InvalidInput

    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdigit()) or unit not in _UNITS_S:
        raise InvalidInput(
            f"{text!r} is no length of time", hint="write a number and d, h, m or s, as in 30d"
        )
    return float(int(number) * _UNITS_S[unit])


def money(cost_usd: float | None) -> str:
    """US dollars, with as many digits as a single call needs; unknown is not free."""
    return "unknown" if cost_usd is None else f"${cost_usd:.4f}"


def print_error(error: AgenticFlowError, *, as_json: bool) -> None:
    """`error:` in red and `hint:` on stderr; with `--json` the problem object on stdout as well."""
    red, dim, reset = (_RED, _DIM, _RESET) if is_colourful(sys.stderr) else ("", "", "")
    sys.stderr.write(f"{red}error: {_one_line(error.message)}{reset}\n")
    if error.hint:
        sys.stderr.write(f"{dim}hint: {_one_line(error.hint)}{reset}\n")
    sys.stderr.flush()
    if as_json:
        from agentic_flow.core.errors import as_problem

        print_json({"error": as_problem(error)})


def _one_line(text: str) -> str:
    return " ".join(text.split())


_MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "broken": ("✗", "red")}


def print_checks(checks: Sequence[tuple[str, str, str, str | None]]) -> None:
    """(state, name, message, hint) one below the other; the hints of what is not ok under it."""
    from rich.text import Text

    out = console()
    width = max((len(name) for _, name, _, _ in checks), default=0)
    for state, name, message, hint in checks:
        mark, colour = _MARKS[state]
        out.print(Text.assemble((f"{mark} ", colour), f"{name:<{width}}  {message}"))
        if hint and state != "ok":
            out.print(Text(f"  {'':<{width}}  → {hint}", style="dim"))
    broken = sum(state == "broken" for state, *_ in checks)
    verdict = f"{broken} broken" if broken else "nothing is broken"
    out.print(Text(f"{len(checks)} checks, {verdict}", style="bold"))
