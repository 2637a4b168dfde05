"""The page of one slide-level run, with its figures as files and its attention for QuPath beside it.

<run>/report.html   figures/<task>_<figure>.png|svg  figures/loss.png|svg   qupath/<slide_id>.geojson
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pathme_jax.errors import UserError
from pathme_jax.files import atomic, read_json
from pathme_jax.reports import evidence, plots, qupath, results, sections
from pathme_jax.reports.attention import Pictures
from pathme_jax.slides.listing import find_slides


def write(
    run_folder: str | Path,
    thumbnails: str | Path | None = None,
    slides: str | Path | None = None,
) -> Path:
    """Writes the report of a finished run; a rerun replaces it.

    Args:
        run_folder: with run.json and a folder a task.
        thumbnails: folder of <slide_id>.jpg or .png, under the heatmaps.
        slides: folder (or CSV, see `slides.listing`) of whole slides, which tiles are cut out of.

    Returns:
        The page.

    Raises:
        UserError: no such run, or no such folders.
    """
    run = Path(run_folder)
    folders = results.task_folders(run)
    if thumbnails is not None and not Path(thumbnails).is_dir():
        raise UserError(f"{thumbnails}: no such folder", "Give --thumbnails a folder of pictures")
    pictures = Pictures(
        None if thumbnails is None else Path(thumbnails),
        {} if slides is None else {slide.slide_id: slide for slide in find_slides(slides)},
    )
    tasks = []
    for folder in folders:
        name = results.read(folder).metrics["name"]
        one = sections.task(folder.name, {name: folder}, pictures)
        tasks.append(one)
        for drawn, image in zip(one["drawn"], one["figures"], strict=True):
            _save(run / "figures", f"{folder.name}_{drawn.name}", drawn, image["png"])
        for shown in one["shown"]:
            if shown.seen.side is not None:
                file = run / "qupath" / f"{shown.slide_id}.geojson"
                qupath.write(file, shown.seen.coords, shown.seen.attention, shown.seen.side)
    loss = evidence.loss(run)
    loss_image = None if loss is None else sections.image(loss)
    if loss is not None and loss_image is not None:
        _save(run / "figures", "loss", loss, loss_image["png"])
    page = run / "report.html"
    sections.write(
        page,
        "slide_level.html",
        title=run.name,
        tasks=tasks,
        loss=loss_image,
        left_out=sections.left_out(tasks),
        **_made(run / "run.json"),
    )
    return page


def _save(folder: Path, name: str, drawn: evidence.Drawn, png: bytes) -> None:
    for kind, content in (("png", png), ("svg", plots.encode(drawn.figure, "svg"))):
        with atomic(folder / f"{name}.{kind}") as temporary:
            temporary.write_bytes(content)


def _made(file: Path) -> dict[str, dict[str, Any]]:
    """Settings and versions from run.json, empty where there is none."""
    content = read_json(file) if file.exists() else {}
    recipe = content.get("recipe", {})
    settings = {key: _shown(value) for key, value in recipe.get("settings", {}).items()}
    if content.get("seconds") is not None:
        settings["seconds"] = f"{content['seconds']:.0f}"
    versions = {**content.get("versions", {})}
    versions |= {key: content[key] for key in ("commit", "python", "machine") if key in content}
    return {"settings": settings, "versions": versions}


def _shown(value: Any) -> str:
    return "–" if value in ("", None) else str(value)
