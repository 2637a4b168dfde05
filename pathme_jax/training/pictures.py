"""What the model is shown, as one picture to look at before a long run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pathme_jax.files import atomic

CELL = 1.1  # inches


def save_views(
    workdir: str | Path, pictures: Mapping[str, np.ndarray], name: str = "views.png"
) -> Path:
    """A contact sheet: a labelled row a kind, its pictures side by side at one size.

    Args:
        pictures: kind → (k, h, w, 3) in 0..1; values beyond (after colour changes) are clipped. Kinds may
            differ in k and in size.

    Returns:
        The file, <workdir>/<name>.
    """
    from matplotlib.figure import Figure  # slow to import

    columns = max(len(row) for row in pictures.values())
    figure = Figure(figsize=(CELL * columns, (CELL + 0.25) * len(pictures)), layout="constrained")
    grid = figure.subplots(len(pictures), columns, squeeze=False)
    for axes, (kind, row) in zip(grid, pictures.items(), strict=True):
        images = np.clip(np.asarray(row, np.float32), 0, 1)
        height, width = images.shape[1:3]
        axes[0].set_title(f"{kind}, {height} × {width} px", loc="left", fontsize=8)
        for cell, image in zip(axes, images, strict=False):
            cell.imshow(image, interpolation="nearest")
            cell.set(xticks=[], yticks=[])  # the frame stays: glass is as white as the paper
        for cell in axes[len(images) :]:
            cell.set_axis_off()
    path = Path(workdir) / name
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=160)
    return path
