"""Plots of a run's numbers: each function draws a Figure, `encode` makes PNG or SVG of it.

Matplotlib's object interface, no window. Colours differ in lightness too, and lines in their dashes, so that they are
told apart without colour.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pathme_jax.evaluation.calibration import Reliability
from pathme_jax.evaluation.survival import Curve

INK, GREY, RULE = "#1f2933", "#6b7680", "#d5dadf"
COLOURS = ("#1b6ca8", "#c8552b", "#3d8b5f", "#7a5195", "#8c6d1f", "#4a4a4a")
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
DPI = 200
WIDTH = 3.5  # inches: letters stay readable at a phone's width, and three abreast
MOST_CELLS = 8  # classes of a confusion matrix up to which shares are written out
# Without a fixed salt and metadata two equal figures would differ in their bytes.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
Line = tuple[np.ndarray, np.ndarray]


def encode(figure: Figure, kind: str = "png") -> bytes:
    """The figure's file: kind "png" or "svg". Equal figures have equal bytes."""
    # Every drawing would move the layout a little on: it is made once and kept, for all files.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pathme_jax", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=_METADATA[kind])
    return buffer.getvalue()


# --- training


def curve(x: Sequence[float], y: Sequence[float], label: str) -> Figure:
    """One small panel of a metric over training steps."""
    figure, axes = _figure(3.2, 1.9)
    axes.plot(x, y, color=COLOURS[0], linewidth=1.4, marker="o" if len(x) < 3 else None)
    axes.set_xlabel("step")
    axes.set_title(label, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if len(y) and max(y) - min(y) < 1e-9:
        axes.set_ylim(y[0] - 0.5, y[0] + 0.5)
    _restrain(axes)
    return figure


def losses(parts: Mapping[str, np.ndarray]) -> Figure:
    """Losses by epoch, thin a fold, bold their mean: name → (f, epochs), NaN where a head had come to rest."""
    figure, axes = _figure(WIDTH, 2.7)
    for i, (name, values) in enumerate(parts.items()):
        epochs = np.arange(1, values.shape[1] + 1)
        style = {"color": COLOURS[i], "linestyle": DASHES[i]}
        for one in values:
            axes.plot(epochs, one, linewidth=0.6, alpha=0.45, **style)
        known = np.isfinite(values)
        mean = np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)
        mean[~known.any(0)] = np.nan
        dot = "o" if len(epochs) < 3 else None
        axes.plot(epochs, mean, linewidth=2.2, label=name, marker=dot, **style)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _restrain(axes)
    _legend_below(figure)
    return figure


# --- classes and labels


def roc(curves: Mapping[str, Line]) -> Figure:
    """ROC curves by name, each (false, true positive rate)."""
    figure, axes = _square(len(curves) + 1)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="chance")
    _lines(axes, curves)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    _legend_below(figure)
    return figure


def precision_recall(curves: Mapping[str, Line], prevalence: Mapping[str, float]) -> Figure:
    """Precision over recall in steps, by name; a dotted line at each one's prevalence, which chance gives."""
    figure, axes = _square(len(curves))
    steps = {
        name: (np.append(0, recall), np.append(precision[:1], precision))
        for name, (recall, precision) in curves.items()
    }
    _lines(axes, steps, drawstyle="steps-pre")
    for i, name in enumerate(curves):
        axes.axhline(prevalence[name], color=_colour(i), linewidth=1, linestyle=(0, (1, 3)))
    axes.set(xlabel="recall", ylabel="precision")
    _legend_below(figure)
    return figure


def confusion(tables: Mapping[str, np.ndarray], names: Mapping[str, Sequence[str]]) -> Figure:
    """Counts and shares of each true class, one panel a table.

    Args:
        tables: title → (c, c) counts, row the true class, column the predicted one.
        names: title → of its classes.
    """
    columns = min(2, len(tables))
    rows = -(-len(tables) // columns)
    classes = max(len(table) for table in tables.values())
    side = WIDTH / columns
    if classes > 2:
        most = min(classes, MOST_CELLS)
        side = max(side, 1.3 + 0.5 * most + 0.34 * (classes - most))
    figure = Figure(figsize=(side * columns, (side * 0.95 + 0.1) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    for axes, (title, table) in zip(panels, tables.items(), strict=False):
        _matrix(axes, np.asarray(table), [_short(name) for name in names[title]])
        axes.set_title(_short(title, 30), loc="left", fontsize=9, color=INK)
    return figure


def _matrix(axes, table: np.ndarray, names: Sequence[str]) -> None:
    total = table.sum(1, keepdims=True)
    share = table / np.maximum(total, 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    for (row, column), count in np.ndenumerate(table):
        text = f"{count:g}"
        if len(table) <= MOST_CELLS and total[row, 0]:
            text += f"\n{100 * share[row, column]:.0f} %"
        colour = "white" if share[row, column] > 0.55 else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    at = np.arange(len(names))
    long = max(map(len, names)) > 6 or len(names) > 5
    axes.set_xticks(at, names, rotation=40 if long else 0, ha="right" if long else "center")
    if long:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")
    axes.set_yticks(at, names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.tick_params(length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)


def reliability(points: Mapping[str, Reliability], stated: Mapping[str, np.ndarray]) -> Figure:
    """Stated against observed probability, and how many rows state each tenth.

    Args:
        points: name → one point a bin; stated: name → (n,) the probabilities, all names' counted together.
    """
    rows = -(-len(points) // 2)
    figure = Figure(figsize=(WIDTH, 4.3 + 0.2 * rows), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 1])
    above.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="perfect")
    for i, (name, found) in enumerate(points.items()):
        style = {"color": _colour(i), "linestyle": DASHES[i % len(DASHES)], "marker": "o"}
        width = 1.3 + 0.4 * (len(points) - 1 - i)
        size = 3.5
        x, y = found.confidence, found.frequency
        above.plot(x, y, linewidth=width, markersize=size, label=name, **style)
    above.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="observed frequency")
    counts, edges = np.histogram(np.concatenate(list(stated.values())), np.arange(11) / 10)
    below.bar(edges[:-1] + 0.05, counts, width=0.09, color=RULE, edgecolor=GREY, linewidth=0.6)
    for x, count in zip(edges[:-1] + 0.05, counts, strict=True):
        if count:
            at = (x, count)
            below.annotate(
                f"{count}", at, (0, 2), textcoords="offset points", ha="center", fontsize=7.5
            )
    below.set(xlabel="stated probability", ylabel="count", ylim=(0, 1.3 * max(1, counts.max())))
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    for axes in (above, below):
        _restrain(axes)
    _legend_below(figure)
    return figure


# --- numbers


def truth_and_prediction(truth: np.ndarray, predicted: np.ndarray, name: str, note: str) -> Figure:
    """A point a case, with the diagonal of perfect prediction; `note` stands above."""
    figure, axes = _figure(WIDTH, 3.7)
    known = np.concatenate([truth, predicted])
    known = known[np.isfinite(known)]
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    room = 0.05 * (high - low) or 0.5
    ends = [low - room, high + room]
    axes.plot(ends, ends, color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="perfect")
    axes.scatter(truth, predicted, s=14, color=COLOURS[0], alpha=0.65, linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel=f"true {_short(name)}", ylabel=f"predicted {_short(name)}")
    axes.set_title(note, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _restrain(axes)
    _legend_below(figure)
    return figure


# --- survival


def kaplan_meier(curves: Mapping[str, Curve], times: Mapping[str, np.ndarray], note: str) -> Figure:
    """Survival by group with 95 % bands, a tick where a patient was censored, and the patients at risk below.

    Args:
        curves: group → its estimate, in months; times: group → (n,) its patients' times.
        note: stands above, such as the log-rank p.
    """
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5.2, 0.5 * len(curves)])
    last = max(float(curve.times[-1]) for curve in curves.values())
    for i, (name, found) in enumerate(curves.items()):
        colour = _colour(i)
        x, y = np.append(0, found.times), np.append(1, found.survival)
        low, high = np.append(1, found.low), np.append(1, found.high)
        above.fill_between(x, low, high, step="post", color=colour, alpha=0.16, linewidth=0)
        label = f"{name} ({len(times[name])})"
        style = {"color": colour, "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.8}
        above.plot(x, y, drawstyle="steps-post", label=label, **style)
        left = found.at_risk - found.events - np.append(found.at_risk[1:], 0)
        lost = left > 0
        above.plot(found.times[lost], found.survival[lost], "|", color=colour, markersize=6)
    above.set(xlim=(-0.02 * last, 1.02 * last), ylim=(-0.02, 1.04), ylabel="share without event")
    above.xaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3))
    above.set_title(note, loc="left", fontsize=9, color=INK)
    above.tick_params(labelbottom=True)
    _restrain(above)
    above.set_xlabel("months", fontsize=9, color=INK)
    ticks = [t for t in above.get_xticks() if 0 <= t <= last]
    for i, name in enumerate(curves):
        for t in ticks:
            count = int((times[name] >= t).sum())
            below.text(t, -i, f"{count}", ha="center", va="center", fontsize=8, color=INK)
    below.set_yticks([-i for i in range(len(curves))], list(curves))
    below.set_ylim(-len(curves) + 0.4, 0.6)
    below.tick_params(length=0, labelsize=8, labelbottom=False, pad=9)
    for i, label in enumerate(below.get_yticklabels()):
        label.set_color(_colour(i))
    below.spines[:].set_visible(False)
    below.set_title("at risk", loc="left", fontsize=8.5, color=GREY)
    _legend_below(figure)
    return figure


def strips(groups: Mapping[str, np.ndarray], label: str) -> Figure:
    """A row of points a group, spread so that they do not hide one another, and a bar at the median."""
    figure, axes = _figure(WIDTH, 0.8 + min(0.6, 0.25 + 2 / max(1, len(groups))) * len(groups))
    for i, values in enumerate(groups.values()):
        # The golden ratio's multiples fill the row evenly, the same every time.
        spread = (np.arange(len(values)) * 0.6180339887) % 1 - 0.5
        axes.scatter(values, -i + 0.5 * spread, s=11, color=COLOURS[0], alpha=0.55, linewidths=0)
        if len(values):
            middle = np.median(values)
            axes.plot([middle] * 2, [-i - 0.36, -i + 0.36], color=INK, linewidth=1.8)
    names = [f"{_short(name)} ({len(values)})" for name, values in groups.items()]
    axes.set_yticks([-i for i in range(len(groups))], names)
    axes.set(xlabel=label, xlim=(-0.02, 1.02), ylim=(-len(groups) + 0.45, 0.55))
    _restrain(axes)
    axes.grid(visible=False, axis="y")
    return figure


# --- shared


def _figure(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _square(entries: int):
    """Axes of the unit square, with room for a legend of so many entries."""
    figure, axes = _figure(WIDTH, 3.6 + 0.2 * ((entries + 1) // 2))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    _restrain(axes)
    return figure, axes


def _lines(axes, curves: Mapping[str, Line], **style) -> None:
    for i, (name, (x, y)) in enumerate(curves.items()):
        # Thinner on top, so that curves that coincide all show.
        width = 1.2 + 1.8 * (len(curves) - 1 - i) / max(2, len(curves) - 1)
        dashes = DASHES[i % len(DASHES)]
        axes.plot(
            x,
            y,
            color=_colour(i),
            linewidth=width,
            linestyle=dashes,
            label=_short(name, 40),
            **style,
        )


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _legend_below(figure: Figure) -> None:
    """Outside of the axes, in one column where a name is long."""
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    columns = 1 if max(map(len, labels)) > 15 else 2
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=9, labelcolor=INK,
        handlelength=2.6,
    )  # fmt: skip


def _restrain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)
