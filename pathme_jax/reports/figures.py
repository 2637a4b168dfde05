"""Pictures of slides, as JPEG bytes: thumbnails, attention over them, tiles."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from pathme_jax.reports.plots import DPI, INK

IMAGE_SHARE = 0.8  # of a heatmap's width; the style sheet's .pair knows it


def ranks(attention: np.ndarray) -> np.ndarray:
    """(m,) from 0, the least attended, to 1, the most; equal attention, equal rank."""
    return np.searchsorted(np.sort(attention), attention, side="left") / max(len(attention) - 1, 1)


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
    rank = ranks(attention)
    total, count = np.zeros((height, width)), np.zeros((height, width))
    for (x0, y0), (x1, y1), value in zip(np.maximum(low, 0), high, rank, strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    heat = np.ma.masked_where(count == 0, total / np.maximum(count, 1))
    grey = cv2.cvtColor(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)

    # The slide fills the left four fifths, so that it can stand beside its picture at the same size.
    inches = 3 * IMAGE_SHARE * height / width
    figure = Figure(figsize=(3, max(1.0, inches)))
    axes = figure.add_axes((0, 0, IMAGE_SHARE, 1))
    axes.imshow(grey)
    axes.imshow(heat, cmap="plasma", vmin=0, vmax=1, alpha=0.55, interpolation="nearest")
    axes.set_axis_off()
    axes.set_anchor("NW")
    beside = figure.add_axes((IMAGE_SHARE + 0.025, 0.01, 0.03, 0.98))
    bar = figure.colorbar(ScalarMappable(cmap="plasma"), cax=beside, ticks=[0, 1])
    labels = bar.ax.set_yticklabels(["least", "most"], fontsize=9, color=INK)
    for label, place in zip(labels, ("bottom", "top"), strict=True):
        label.set_verticalalignment(place)
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


def _jpeg_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=DPI, pil_kwargs={"quality": 80})
    return buffer.getvalue()
