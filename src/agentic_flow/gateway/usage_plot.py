"""A picture of the usage ledger: cost or tokens per day, the models stacked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

from agentic_flow.core.errors import InvalidInput, Unavailable
from agentic_flow.gateway.usage_table import NANO, UsageRow

Measure = Literal["cost", "tokens"]

MODELS_MAX = 8
"""Models with a colour of their own; the rest are "other"."""
OTHER = "other"
DAYS_MAX = 1500

_ENDINGS: dict[str, Literal["png", "svg"]] = {".png": "png", ".svg": "svg"}
_LABEL_CHARS_MAX = 34
# Paul Tol's "bright" and "muted" schemes mixed: told apart by the colour-blind, dark enough on white.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccaa33", "#66ccee", "#aa3377", "#ee8833", "#332288")
_OTHER_COLOUR = "#999999"
_INK, _FAINT = "#222222", "#767676"


@dataclass(frozen=True, slots=True)
class DailySeries:
    """What is drawn.

    Args:
        days: Every day from the first with calls to the last, also those without.
        series: Model → one amount per day, in US dollars or tokens, the largest model first.
    """

    measure: Measure
    days: list[date]
    series: dict[str, list[float]]


def plot_kind(path: Path) -> Literal["png", "svg"]:
    """By the file's ending.

    Raises:
        InvalidInput: it is none of both.
    """
    kind = _ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InvalidInput(f"{path.name!r} is neither PNG nor SVG", hint="end it in .png or .svg")
    return kind


def daily_series(rows: Sequence[UsageRow], measure: Measure) -> DailySeries:
    """The days and models of rows that are grouped by day and model.

    Raises:
        InvalidInput: the days are too many for a picture.
    """
    amounts: dict[str, dict[date, int]] = {}
    for row in rows:
        day = date.fromisoformat(row.keys["day"])
        amount = row.cost_nano_usd if measure == "cost" else row.input_tokens + row.output_tokens
        of_model = amounts.setdefault(row.keys["model"], {})
        of_model[day] = of_model.get(day, 0) + amount
    totals = {model: sum(per_day.values()) for model, per_day in amounts.items()}
    ranked = sorted((model for model in amounts if totals[model]), key=lambda m: (-totals[m], m))
    own = ranked if len(ranked) <= MODELS_MAX else ranked[: MODELS_MAX - 1]
    seen = [day for per_day in amounts.values() for day in per_day]
    first, last = min(seen), max(seen)
    count = (last - first).days + 1
    if count > DAYS_MAX:
        raise InvalidInput(f"{count!r} days are too many for a plot", hint=f"at most {DAYS_MAX}: use --since")
    days = [first + timedelta(days=number) for number in range(count)]
    scale = NANO if measure == "cost" else 1
    series = {model: [amounts[model].get(day, 0) / scale for day in days] for model in own}
    rest = ranked[len(own) :]
    if rest:
        series[OTHER] = [sum(amounts[model].get(day, 0) for model in rest) / scale for day in days]
    return DailySeries(measure, days, series)


def figure_class() -> Any:
    """matplotlib's Figure; its types are too loose to be of use.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable(
            "plots need the library matplotlib, which is not installed",
            hint="pip install 'agentic-flow[plot]'",
        ) from None
    return cast(Any, Figure)


def draw(path: Path, kind: Literal["png", "svg"], drawn: DailySeries, *, subtitle: str) -> None:
    """Draw it into a file.

    Args:
        subtitle: One line on what it shows: whose calls, how many, what is not in it.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    make_figure = figure_class()
    import matplotlib

    # Text as text, dollars included, and no random ids: the same rows make the same file.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "agentic-flow", "text.parse_math": False}
    with warnings.catch_warnings(), cast(Any, matplotlib).rc_context(options):
        # A letter that the font lacks is drawn as a box; the rest of the picture is right.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = make_figure(figsize=(10.0, 5.2), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        _bars(axes, drawn)
        _axes(axes, drawn)
        what = "Cost of model calls per day" if drawn.measure == "cost" else "Tokens of model calls per day"
        axes.set_title(what, loc="left", fontsize=15, fontweight="bold", color=_INK, pad=28)
        axes.text(0.0, 1.025, subtitle, transform=axes.transAxes, fontsize=9, color=_FAINT)
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, metadata=metadata, facecolor="white")


def _bars(axes: Any, drawn: DailySeries) -> None:
    bottoms = [0.0] * len(drawn.days)
    width = 0.8 if len(drawn.days) < 120 else 1.0
    colours = dict(zip(drawn.series, _COLOURS, strict=False)) | {OTHER: _OTHER_COLOUR}
    for model, amounts in drawn.series.items():
        label = f"{_label(model)}  ({amount_text(sum(amounts), drawn.measure)})"
        axes.bar(drawn.days, amounts, bottom=bottoms, width=width, color=colours[model], label=label)
        bottoms = [low + amount for low, amount in zip(bottoms, amounts, strict=True)]
    if drawn.series:
        handles, labels = axes.get_legend_handles_labels()
        # The legend reads as the stack does: the last drawn lies on top.
        axes.legend(
            handles[::-1], labels[::-1], title="model", loc="upper left", bbox_to_anchor=(1.01, 1.0),
            frameon=False, borderaxespad=0.0, fontsize=9, title_fontsize=10, alignment="left",
            handletextpad=0.6, labelcolor=_INK,
        )  # fmt: skip


def _axes(axes: Any, drawn: DailySeries) -> None:
    from matplotlib import dates, ticker

    own_dates, own_ticker = cast(Any, dates), cast(Any, ticker)
    half = timedelta(hours=14)
    first, last = (_midnight(day) for day in (drawn.days[0], drawn.days[-1]))
    axes.set_xlim(first - half, last + half)
    if len(drawn.days) <= 10:
        axes.set_xticks(drawn.days)
    else:
        axes.xaxis.set_major_locator(own_dates.AutoDateLocator(minticks=4, maxticks=10))
    axes.xaxis.set_major_formatter(own_dates.DateFormatter("%d %b" if len(drawn.days) < 300 else "%b %Y"))

    axes.set_ylim(bottom=0)
    # All marks of the axis with as many digits as its top needs.
    digits = _digits(axes.get_ylim()[1])

    def shown(value: float, position: int) -> str:
        return f"${value:,.{digits}f}" if drawn.measure == "cost" else amount_text(value, "tokens")

    axes.yaxis.set_major_formatter(own_ticker.FuncFormatter(shown))
    if drawn.measure == "tokens":
        axes.yaxis.set_major_locator(own_ticker.MaxNLocator(integer=True))
    unit = "US dollars per day" if drawn.measure == "cost" else "tokens per day, input and output"
    axes.set_ylabel(unit, color=_INK, labelpad=8)
    span = f"{drawn.days[0]} to {drawn.days[-1]}" if len(drawn.days) > 1 else str(drawn.days[0])
    axes.set_xlabel(f"days in UTC, {span}", color=_INK, labelpad=8)
    axes.grid(visible=True, axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")


def _midnight(day: date) -> datetime:
    """A date as a moment: adding hours to a plain date has no effect. The axis has no zone either."""
    return datetime(day.year, day.month, day.day)


def amount_text(amount: float, measure: Measure) -> str:
    """`$12.30`, `$0.0042`, `1.5M`."""
    if measure == "cost":
        return f"${amount:,.{_digits(amount)}f}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            return f"{amount / size:.3g}{letter}"
    return f"{amount:.0f}"


def _digits(amount: float) -> int:
    return 0 if amount >= 1000 else 2 if amount >= 0.1 or amount == 0 else 4 if amount >= 0.001 else 7


def _label(model: str) -> str:
    line = " ".join(model.split()) or "none"
    return line if len(line) <= _LABEL_CHARS_MAX else f"{line[: _LABEL_CHARS_MAX - 1]}…"
