"""Pictures of what memory did: success with and without it over time, the bank's growth, what is believed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args

from agentic_flow.core.errors import InvalidInput, Unavailable
from agentic_flow.memory.series import Arm, MemorySeries, SuccessPoint

Picture = Literal["success", "growth", "confidence"]
PICTURES: tuple[Picture, ...] = get_args(Picture)

_ENDINGS: dict[str, Literal["png", "svg"]] = {".png": "png", ".svg": "svg"}
# Paul Tol's "bright" scheme: told apart by the colour-blind, dark enough on white.
_WITH, _WITHOUT, _THIRD = "#4477aa", "#ee6677", "#228833"
_INK, _FAINT = "#222222", "#767676"
_TITLES: dict[Picture, str] = {
    "success": "Success of runs with and without memory",
    "growth": "Growth of the bank",
    "confidence": "What is believed of the active items",
}


def plot_kind(path: Path) -> Literal["png", "svg"]:
    """By the file's ending.

    Raises:
        InvalidInput: it is none of both.
    """
    kind = _ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InvalidInput(f"{path.name!r} is neither PNG nor SVG", hint="end it in .png or .svg")
    return kind


def known_pictures(names: Sequence[str]) -> tuple[Picture, ...]:
    """The pictures of these names, each once.

    Raises:
        InvalidInput: there is no such picture.
    """
    for name in names:
        if name not in PICTURES:
            raise InvalidInput(f"there is no picture {name!r}", hint=f"use {', '.join(PICTURES)}")
    return tuple(picture for picture in PICTURES if picture in names)


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


def draw(path: Path, kind: Literal["png", "svg"], series: MemorySeries, pictures: Sequence[Picture]) -> None:
    """Draw pictures one below the other into a file.

    Args:
        path: The file.
        kind: What it becomes.
        series: What is drawn; a picture without data says so.
        pictures: Which, at least one.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    make_figure = figure_class()
    import matplotlib

    # Text as text and no random ids: the same numbers make the same file.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "agentic-flow", "text.parse_math": False}
    with warnings.catch_warnings(), cast(Any, matplotlib).rc_context(options):
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = make_figure(figsize=(10.5, 3.9 * len(pictures)), dpi=150, layout="constrained")
        all_axes = figure.subplots(len(pictures), 1, squeeze=False)
        for picture, axes in zip(pictures, all_axes[:, 0], strict=True):
            subtitle = _DRAWN[picture](axes, series)
            axes.set_title(_TITLES[picture], loc="left", fontsize=13, fontweight="bold", color=_INK, pad=24)
            axes.text(0.0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color=_FAINT)
            _tidy(axes)
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, metadata=metadata, facecolor="white")


def _draw_success(axes: Any, series: MemorySeries) -> str:
    drawn = False
    arms: tuple[tuple[Arm, str, str], ...] = (
        ("with", _WITH, "shown items"),
        ("without", _WITHOUT, "shown none"),
    )
    for arm, colour, label in arms:
        points = [point for point in series.success if point.arm == arm]
        if not points:
            continue
        drawn = True
        middles = [_moment((point.from_s + point.until_s) / 2) for point in points]
        axes.fill_between(
            middles, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0
        )
        total = sum(point.runs for point in points)
        axes.plot(
            middles,
            [point.share for point in points],
            color=colour,
            marker="o",
            markersize=4,
            label=f"{label} ({total} runs, {_share(points)})",
        )
    axes.set_ylim(-0.02, 1.02)
    _percent(axes)
    axes.set_ylabel("share of judged runs", color=_INK)
    if not drawn:
        return _nothing(axes, "no run was judged yet")
    _legend(axes)
    _time_axis(axes)
    return (
        f"{series.judged} judged runs, {series.unjudged} without a verdict that tells · "
        f"one point each {_period(series.period_s)}, with its 95 % interval · not randomised: see the uplift"
    )


def _draw_growth(axes: Any, series: MemorySeries) -> str:
    axes.set_ylabel("kept", color=_INK)
    if not series.growth:
        return _nothing(axes, "nothing is kept yet")
    times = [_moment(point.at_s) for point in series.growth]
    for label, colour, values in (
        ("runs recorded", _WITHOUT, [point.trajectories for point in series.growth]),
        ("items ever", _THIRD, [point.items for point in series.growth]),
        ("of them active now", _WITH, [point.active for point in series.growth]),
    ):
        axes.step(times, values, where="post", color=colour, label=f"{label} ({values[-1]:,})")
        axes.plot(times[-1:], values[-1:], color=colour, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _legend(axes)
    _time_axis(axes)
    return "runs as long as they are kept; items that were merged, pruned or contradicted are no more active"


def _draw_confidence(axes: Any, series: MemorySeries) -> str:
    axes.set_ylabel("active items", color=_INK)
    axes.set_xlabel("mean belief: the chance that a run which uses the item succeeds", color=_INK, labelpad=8)
    axes.set_xlim(0, 1)
    if not series.confidence:
        return _nothing(axes, "there is no active item yet")
    bins = series.confidence
    width = (bins[0].high - bins[0].low) * 0.92
    middles = [(one.low + one.high) / 2 for one in bins]
    tested = [one.tested for one in bins]
    untested = [one.untested for one in bins]
    axes.bar(middles, tested, width=width, color=_WITH, label=f"with credited uses ({sum(tested)})")
    axes.bar(
        middles,
        untested,
        bottom=tested,
        width=width,
        color="#bbbbbb",
        label=f"not used yet ({sum(untested)})",
    )
    axes.set_ylim(bottom=0)
    _whole_numbers(axes)
    _legend(axes)
    return "means of Beta posteriors: the prior by who wrote the item, and outcomes of runs that used it"


_DRAWN: dict[Picture, Callable[[Any, MemorySeries], str]] = {
    "success": _draw_success,
    "growth": _draw_growth,
    "confidence": _draw_confidence,
}


def _nothing(axes: Any, text: str) -> str:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_FAINT, fontsize=11)
    axes.set_xticks([])
    axes.set_yticks([])
    return ""


def _legend(axes: Any) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0, fontsize=9,
        labelcolor=_INK,
    )  # fmt: skip


def _share(points: Sequence[SuccessPoint]) -> str:
    runs = sum(point.runs for point in points)
    return f"{sum(point.successes for point in points) / runs:.0%}"


def _tidy(axes: Any) -> None:
    axes.grid(visible=True, axis="y", color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_FAINT, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")


def _percent(axes: Any) -> None:
    from matplotlib import ticker

    axes.yaxis.set_major_formatter(cast(Any, ticker).PercentFormatter(xmax=1.0, decimals=0))


def _whole_numbers(axes: Any) -> None:
    from matplotlib import ticker

    axes.yaxis.set_major_locator(cast(Any, ticker).MaxNLocator(integer=True))


def _time_axis(axes: Any) -> None:
    from matplotlib import dates

    own = cast(Any, dates)
    locator = own.AutoDateLocator(minticks=3, maxticks=9)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(own.ConciseDateFormatter(locator))
    axes.set_xlabel("time in UTC", color=_INK, labelpad=8)


def _moment(at_s: float) -> datetime:
    """Without a zone: the axis is in UTC and says so."""
    return datetime.fromtimestamp(at_s, UTC).replace(tzinfo=None)


def _period(period_s: float) -> str:
    for size_s, name in ((86_400.0, "day"), (3_600.0, "hour"), (60.0, "minute")):
        if period_s >= size_s:
            count = round(period_s / size_s)
            return f"{count} {name}s" if count > 1 else name
    return f"{period_s:g} s"
