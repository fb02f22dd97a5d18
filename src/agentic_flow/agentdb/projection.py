"""A namespace in two dimensions: principal components of its vectors, and their picture.

The axes are the two directions in which the vectors vary most (Pearson 1901; singular value decomposition).
Their labels say how much of the variance they show: points that lie together there may lie apart elsewhere.
"""

from __future__ import annotations

import asyncio
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from agentic_flow.agentdb.paging import Progress, find_namespace, no_progress, sample_items
from agentic_flow.agentdb.transfer_files import file_errors, replacing
from agentic_flow.core.errors import InvalidInput, Unavailable
from agentic_flow.core.ports import VectorStore
from agentic_flow.core.vectors import Filter, Item, Namespace

POINTS_MAX = 100_000
GROUPS_MAX = 8
"""Values of the key that get a colour of their own; the rest are "other"."""
OTHER, WITHOUT = "other", "none"
TITLE_CHARS_LARGE = 50
EMBEDDER_CHARS_MAX = 60

_ENDINGS: dict[str, Literal["png", "svg"]] = {".png": "png", ".svg": "svg"}
_LABEL_CHARS_MAX = 28
# Paul Tol's "bright" and "muted" schemes mixed: told apart by the colour-blind, dark enough on white.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccaa33", "#66ccee", "#aa3377", "#ee8833", "#332288")
_OTHER_COLOUR, _WITHOUT_COLOUR = "#999999", "#cccccc"
_INK, _FAINT = "#222222", "#767676"


@dataclass(frozen=True, slots=True)
class Projection:
    """Points of shape (n, 2), and the share of the variance that each axis shows."""

    points: NDArray[np.float64]
    explained: tuple[float, float]


@dataclass(frozen=True, slots=True)
class PlotReport:
    """What a plot shows. `groups` are the values of the key with their numbers of points."""

    namespace: str
    path: str
    points: int
    items: int
    explained: tuple[float, float]
    color_by: str | None
    groups: dict[str, int]


def project(vectors: NDArray[np.float32]) -> Projection:
    """Coordinates along the first two principal components.

    Args:
        vectors: Shape (n, dimension), n at least 1.
    """
    centred = vectors.astype(np.float64)
    centred -= centred.mean(axis=0)
    if len(centred) > centred.shape[1]:
        # Of many points the covariance is the smaller matrix, with the same directions.
        eigenvalues, directions = np.linalg.eigh(centred.T @ centred)
        variances = np.maximum(eigenvalues[::-1], 0.0)
        axes = directions[:, ::-1].T[:2]
    else:
        _, singular, axes = np.linalg.svd(centred, full_matrices=False)
        variances, axes = singular**2, axes[:2]
    # A direction and its opposite are equally good: the one in which the largest number is positive.
    signs = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])
    axes = axes * np.where(signs == 0, 1.0, signs)[:, None]
    points = np.zeros((len(centred), 2))
    points[:, : len(axes)] = centred @ axes.T
    total = float(variances.sum())
    shares = [float(variance) / total if total > 0 else 0.0 for variance in variances[:2]]
    shares += [0.0] * (2 - len(shares))
    return Projection(points, (shares[0], shares[1]))


async def plot_namespace(
    store: VectorStore,
    tenant: str,
    namespace: str,
    path: Path,
    *,
    color_by: str | None = None,
    limit: int = 5000,
    where: Filter | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> PlotReport:
    """Draw a random sample of a namespace as PNG or SVG.

    Args:
        path: Ends in .png or .svg.
        color_by: Key of the metadata whose values give the colours.
        limit: Most points; of a larger namespace they are drawn at random.

    Raises:
        NotFound: there is no such namespace.
        InvalidInput: it is empty, the ending is none of both, or no item has the key.
        Conflict: the file exists, and is not to be overwritten.
        Unavailable: matplotlib is not installed.
    """
    kind = _ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise InvalidInput(f"{path.name!r} is neither PNG nor SVG", hint="end it in .png or .svg")
    if not 1 <= limit <= POINTS_MAX:
        raise InvalidInput(f"a limit of {limit!r} points is out of range", hint=f"1 to {POINTS_MAX}")
    _figure_class()
    found = await find_namespace(store, tenant, namespace)
    chosen, items = await sample_items(store, tenant, found, limit, where=where, seed=seed, progress=progress)
    if not chosen:
        raise InvalidInput(f"nothing in namespace {namespace!r} to draw", hint="fill it, or widen the filter")
    if color_by is not None and not any(color_by in item.metadata for item in chosen):
        keys = sorted({key for item in chosen for key in item.metadata})[:20]
        raise InvalidInput(
            f"no item has the key {color_by!r}",
            hint=f"there is {', '.join(map(repr, keys)) or 'no metadata'}",
        )

    def draw() -> tuple[Projection, dict[str, int]]:
        data = b"".join(item.vector.data for item in chosen if item.vector is not None)
        projection = project(np.frombuffer(data, "<f4").reshape(len(chosen), found.dimension))
        with replacing(path, overwrite=overwrite) as part, file_errors(path):
            return projection, _draw(part, kind, found, chosen, items, projection, color_by)

    projection, groups = await asyncio.to_thread(draw)
    return PlotReport(namespace, str(path), len(chosen), items, projection.explained, color_by, groups)


def group_labels(items: Sequence[Item], key: str) -> tuple[list[str], list[str]]:
    """The group of each item by its value of a key, and the groups in the order of the legend: by size, then
    by name; after GROUPS_MAX of them OTHER, and at the end WITHOUT for items that have no such value."""
    raw = [_value_label(item.metadata[key]) if item.metadata.get(key) is not None else None for item in items]
    counts = Counter(label for label in raw if label is not None)
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    own = ranked if len(ranked) <= GROUPS_MAX else ranked[: GROUPS_MAX - 1]
    kept = set(own)
    labels = [WITHOUT if label is None else label if label in kept else OTHER for label in raw]
    extra = [label for label in (OTHER, WITHOUT) if label in labels and label not in kept]
    return labels, [*own, *extra]


def _value_label(value: Any) -> str:
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    line = " ".join(text.split())
    return line if len(line) <= _LABEL_CHARS_MAX else f"{line[: _LABEL_CHARS_MAX - 1]}…"


def numeric_values(items: Sequence[Item], key: str) -> NDArray[np.float64] | None:
    """The values of a key as numbers, NaN where an item has none; None unless they are numbers of more kinds
    than there are colours."""
    values = [item.metadata.get(key) for item in items]
    given = [value for value in values if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return None
    if len(set(given)) <= GROUPS_MAX:
        return None
    return np.array([math.nan if value is None else float(value) for value in values])


def _figure_class() -> Any:
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


def _draw(
    path: Path,
    kind: Literal["png", "svg"],
    namespace: Namespace,
    items: Sequence[Item],
    population: int,
    projection: Projection,
    color_by: str | None,
) -> dict[str, int]:
    """Draw it; the groups of the legend with their numbers of points."""
    import matplotlib

    # Text as text, dollars included, and no random ids: the same rows make the same file.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "agentic-flow", "text.parse_math": False}
    with warnings.catch_warnings(), cast(Any, matplotlib).rc_context(options):
        # A letter that the font lacks is drawn as a box; the rest of the picture is right.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = _figure_class()(figsize=(9.0, 6.4), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        groups = _scatter(figure, axes, items, projection.points, color_by)
        shown = f"{len(items):,}" if len(items) == population else f"{len(items):,} of {population:,}"
        chosen = "" if len(items) == population else ", drawn at random"
        title_size = 15 if len(namespace.name) <= TITLE_CHARS_LARGE else 8
        axes.set_title(namespace.name, loc="left", fontsize=title_size, fontweight="bold", color=_INK, pad=28)
        axes.text(
            0.0, 1.018, f"{shown} items{chosen} · {namespace.dimension} dimensions · {namespace.metric} · "
            f"{namespace.embedder_id[:EMBEDDER_CHARS_MAX]}",
            transform=axes.transAxes, fontsize=9, color=_FAINT,
        )  # fmt: skip
        for set_label, share, number in zip(
            (axes.set_xlabel, axes.set_ylabel), projection.explained, (1, 2), strict=True
        ):
            set_label(f"principal component {number} ({share:.1%} of the variance)", color=_INK, labelpad=8)
        axes.set_aspect("equal", adjustable="datalim")
        axes.grid(visible=True, color="#ececec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_FAINT, labelsize=8, length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, format=kind, metadata=metadata, facecolor="white")
    return groups


def _scatter(
    figure: Any, axes: Any, items: Sequence[Item], points: NDArray[np.float64], color_by: str | None
) -> dict[str, int]:
    count = len(items)
    # Fewer points are larger and more solid; many must let those below shine through.
    size = float(np.clip(9000 / count, 7, 46))
    alpha = float(np.clip(40 / math.sqrt(count), 0.35, 0.85))
    style: Any = {"s": size, "alpha": alpha, "linewidths": 0.3, "edgecolors": "white"}
    if color_by is None:
        axes.scatter(points[:, 0], points[:, 1], color=_COLOURS[0], **style)
        return {}
    numbers = numeric_values(items, color_by)
    if numbers is not None:
        return _scatter_numbers(figure, axes, points, numbers, color_by, style)
    labels, order = group_labels(items, color_by)
    colours = dict(zip(order, _COLOURS, strict=False))
    colours |= {
        label: colour
        for label, colour in ((OTHER, _OTHER_COLOUR), (WITHOUT, _WITHOUT_COLOUR))
        if label in order[-2:]
    }
    counts = Counter(labels)
    of_label = np.array(labels)
    # The legend goes from large to small; the small ones are drawn last, or the large ones would bury them.
    for label in sorted(order, key=lambda label: -counts[label]):
        chosen = points[of_label == label]
        axes.scatter(chosen[:, 0], chosen[:, 1], color=colours[label], label=label, **style)
    handles = dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0], strict=True))
    legend = axes.legend(
        [handles[label] for label in order],
        [f"{label}  ({counts[label]:,})" for label in order],
        title=color_by, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0,
        fontsize=9, title_fontsize=10, alignment="left", handletextpad=0.4, labelcolor=_INK,
    )  # fmt: skip
    for handle in legend.legend_handles:
        handle.set_sizes([40])
        handle.set_alpha(1.0)
    return {label: counts[label] for label in order}


def _scatter_numbers(
    figure: Any, axes: Any, points: NDArray[np.float64], numbers: NDArray[np.float64], key: str, style: Any
) -> dict[str, int]:
    given = ~np.isnan(numbers)
    without = int((~given).sum())
    grey = f"; grey: {without:,} without" if without else ""
    axes.scatter(points[~given, 0], points[~given, 1], color=_WITHOUT_COLOUR, **style)
    drawn = axes.scatter(points[given, 0], points[given, 1], c=numbers[given], cmap="viridis", **style)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02, shrink=0.85, aspect=28)
    bar.set_label(f"{key}  ({int(given.sum()):,}{grey})", color=_INK)
    bar.solids.set_alpha(1.0)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_FAINT, labelsize=8, length=0)
    return {WITHOUT: without} if without else {}
