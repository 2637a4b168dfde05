"""Figures of the report, as PNG or JPEG bytes. Matplotlib's object interface: no global state, no window."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, GREY, RULE = "#1f2933", "#6b7680", "#d5dadf"
COLOURS = ("#1b6ca8", "#c8552b", "#3d8b5f", "#7a5195", "#8c6d1f", "#4a4a4a")
DPI = 160
# Without a fixed salt and metadata two equal figures would differ in their bytes.
_PNG = {"format": "png", "dpi": DPI, "metadata": {"Software": None}}


def curve(x: Sequence[float], y: Sequence[float], label: str) -> bytes:
    """One small panel of a metric over training steps: PNG."""
    figure = Figure(figsize=(3.2, 1.9), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, color=COLOURS[0], linewidth=1.4, marker="o" if len(x) < 3 else None)
    axes.set_xlabel("step")
    axes.set_title(label, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if len(y) and max(y) - min(y) < 1e-9:
        axes.set_ylim(y[0] - 0.5, y[0] + 0.5)
    _restrain(axes)
    return _png(figure)


def roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """ROC curves (false, true positive rate) by name, legend below the axes: PNG."""
    rows = (len(curves) + 2) // 2
    figure = Figure(figsize=(4.0, 4.1 + 0.2 * rows), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (2, 3)), label="chance")
    for i, (name, (x, y)) in enumerate(curves.items()):
        # Thinner on top, so that curves that coincide all show.
        width = 1.3 + 0.7 * (len(curves) - 1 - i)
        axes.plot(x, y, color=COLOURS[i % len(COLOURS)], linewidth=width, label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    _restrain(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    return _png(figure)


def attention_overlay(
    thumbnail: np.ndarray,
    coords: np.ndarray,
    attention: np.ndarray,
    patch_size_level0: float,
    level0_size: tuple[int, int],
) -> bytes:
    """A slide with its instances coloured by the rank of their attention, and a colour bar: JPEG.

    Args:
        thumbnail: (h, w, 3) uint8.
        coords: (m, 2) level-0 x, y of the spatial instances; several at one place are averaged.
        attention: (m,) any scale: only its order is shown.
        patch_size_level0: side of an instance in level-0 pixels.
        level0_size: (width, height) of the slide.
    """
    height, width = thumbnail.shape[:2]
    scale = np.array([width / level0_size[0], height / level0_size[1]])
    low = np.round(coords * scale).astype(int)
    high = np.maximum(np.round((coords + patch_size_level0) * scale).astype(int), low + 1)
    rank = np.searchsorted(np.sort(attention), attention, side="left") / max(len(attention) - 1, 1)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (x0, y0), (x1, y1), value in zip(np.maximum(low, 0), high, rank, strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    heat = np.ma.masked_where(count == 0, total / np.maximum(count, 1))
    grey = cv2.cvtColor(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)

    figure = Figure(figsize=(4.4, 4.4 * height / width * 0.86))
    figure.set_layout_engine("constrained", w_pad=0, h_pad=0)
    axes = figure.subplots()
    axes.imshow(grey)
    axes.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.55, interpolation="nearest")
    axes.set_axis_off()
    bar = figure.colorbar(
        ScalarMappable(cmap="plasma"), ax=axes, fraction=0.046, pad=0.03, ticks=[0, 1]
    )
    bar.ax.set_yticklabels(["least", "most"], fontsize=9, color=INK)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return _jpeg_of(figure)


def picture(path: Path, side: int = 480) -> bytes | None:
    """The picture at most `side` px high and wide as JPEG, or None if it cannot be read."""
    image = read_picture(path, side)
    return None if image is None else encode_jpeg(image)


def read_picture(path: Path, side: int) -> np.ndarray | None:
    """(h, w, 3) RGB, at most `side` px high and wide, or None."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if Path(path).is_file() else None
    if image is None:
        return None
    scale = side / max(image.shape[:2])
    if scale < 1:
        size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image


def encode_jpeg(image: np.ndarray) -> bytes:
    """(h, w, 3) RGB → JPEG of quality 80."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def _restrain(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=8, color=GREY)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=9, color=INK)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **_PNG)
    return buffer.getvalue()


def _jpeg_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=DPI, pil_kwargs={"quality": 80})
    return buffer.getvalue()
