"""Slides to report: every stage in order, each skipping what is done under the same recipe.

    <workdir>/cohort-<hash8>/             synthetic slides and labels, when no slides are given
    <workdir>/tiles/                      contours, and one grid folder a recipe: fields, features, regions
    <workdir>/runs/<grid>/                training runs: patch-<hash8>, region-<hash8>
    <workdir>/mil/<grid>/                 cross-validations, a folder for each task and kind of bag
    <workdir>/reports/<grid>/             report.html, metrics.json, timings.json

Another --mpp or seed works in sibling folders, so going back costs nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import dinov2_tiny, pathme_tiny
from pathme_jax.encoders.encoder import load
from pathme_jax.encoders.extraction import Extracted, extract_fields
from pathme_jax.encoders.region_extraction import extract_regions
from pathme_jax.errors import UserError
from pathme_jax.files import digest, listed, provenance, read_csv, read_json, write_csv, write_json
from pathme_jax.mil import run as mil
from pathme_jax.mil.comparison import compare
from pathme_jax.records import features as feature_files
from pathme_jax.records.join import column_name, join
from pathme_jax.slides import tile
from pathme_jax.synthetic.cohort import write_cohort
from pathme_jax.training.contract import Config
from pathme_jax.training.loop import train

Bags = dict[str, dict[str, Path]]  # kind of bag to arguments of `mil.run`

EXPERT = "hed_texture"
TASKS = ("detail", "architecture", "subtype")  # of the synthetic cohort


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a demonstration run is made of; the defaults fit two cores and ten minutes.

    variant: of configs dinov2_tiny and pathme_tiny; "test" has encoders that learn little and cost little.
    """

    cohort: int = 40
    size: int = 4096
    mpp: float = 0.5
    patch_steps: int = 120
    region_steps: int = 60
    seed: int = 0
    workers: int = 2
    variant: str = ""


class Stages:
    """Prints each stage's name and seconds, and keeps them for timings.json."""

    def __init__(self, total: int):
        self.total, self.seconds = total, {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"[{len(self.seconds) + 1}/{self.total}] {name}", flush=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"      {self.seconds[name]} s", flush=True)


def patch_config(settings: Settings, grid_dir: Path) -> Config:
    config = dinov2_tiny.get_config(settings.variant)
    config.seed, config.steps = settings.seed, settings.patch_steps
    config.batch.mpps = (settings.mpp, 4 * settings.mpp)
    config.data.path = str(grid_dir)
    return config


def region_config(settings: Settings, encoder: str, regions_dir: Path) -> Config:
    config = pathme_tiny.get_config(settings.variant)
    config.seed, config.steps = settings.seed, settings.region_steps
    config.columns = dict(
        fine=column_name(encoder, settings.mpp),
        coarse=column_name(encoder, 4 * settings.mpp),
        experts={EXPERT: column_name(EXPERT, settings.mpp)},
    )
    config.data.path = str(regions_dir)
    return config


def workdir_of(parent: Path, role: str, config: Config) -> Path:
    """Runs of other settings get other folders; where the data lies does not matter."""
    settings = {k: v for k, v in config.to_dict().items() if k != "data"}
    return parent / f"{role}-{digest(settings)}"


@dataclasses.dataclass(frozen=True)
class Made:
    """Work folders of both encoders, and the bags they made."""

    patch: Path
    region: Path
    bags: Bags


def encode_slides(
    settings: Settings, grid_dir: Path, runs: Path, stages: Stages
) -> tuple[Made, list[dict[str, str]]]:
    """Trains both encoders and extracts every bag; also the slides that failed on the way."""
    with stages.stage("train the patch encoder (DINOv2)"):
        config = patch_config(settings, grid_dir)
        patch = train(config, workdir_of(runs, "patch", config))
    with stages.stage("extract tile features"):
        tiles = extract_fields(grid_dir, [patch, EXPERT, "mean_rgb"])
    name = load(patch).name
    with stages.stage("join magnifications and experts into regions"):
        joined = join(grid_dir, [(name, 1), (name, 4), (EXPERT, 1)])
    with stages.stage("train the region encoder (PatHME)"):
        config = region_config(settings, name, joined.folder)
        region = train(config, workdir_of(runs, "region", config))
    with stages.stage("extract multi-scale region tokens"):
        tokens = extract_regions(joined.folder, region)
    bags = bags_of(settings, name, tiles, tokens)
    return Made(patch, region, bags), [*tiles.errors, *joined.errors, *tokens.errors]


def bags_of(settings: Settings, name: str, tiles: Extracted, tokens: Extracted) -> Bags:
    """The four kinds of bag compared, as arguments of `mil.run`."""
    fine, coarse = tiles.folders[name, settings.mpp], tiles.folders[name, 4 * settings.mpp]
    return {
        f"{feature_files.magnification(settings.mpp):g}x only": {"features": fine},
        f"{feature_files.magnification(4 * settings.mpp):g}x only": {"features": coarse},
        "concatenated": {"features": fine, "parent": coarse},
        "PatHME": {"features": next(iter(tokens.folders.values()))},
    }


def mean_colours(grid_dir: Path, mpp: float) -> Path:
    """slide_id,r,g,b: each slide's mean tissue colour, for the control row."""
    folder = grid_dir / feature_files.folder_name(mpp) / "features_mean_rgb"
    rows = []
    for path in listed(folder, ".h5"):
        colour = feature_files.read_features(path).features
        if len(colour):
            r, g, b = (round(float(x), 6) for x in colour.mean(0))
            rows.append({"slide_id": path.stem, "r": r, "g": g, "b": b})
    write_csv(grid_dir / "mean_colour.csv", rows, ["slide_id", "r", "g", "b"])
    return grid_dir / "mean_colour.csv"


def run(
    workdir: str | Path,
    settings: Settings,
    *,
    slides: Path | None = None,
    labels: Path | None = None,
    tasks: tuple[str, ...] = (),
    mpp_csv: Path | None = None,
) -> Path:
    """Runs every stage and returns the path of report.html.

    Args:
        slides, labels, tasks: given together; without slides a synthetic cohort is made, with tasks among TASKS.
        mpp_csv: µm/px of slides that do not state it.
    """
    workdir = Path(workdir)
    synthetic = slides is None
    if (labels is None) != synthetic or not (synthetic or tasks):
        raise UserError(
            "--slides, --labels and --task belong together",
            "Give all three, or --task alone or none for the demo",
        )
    unknown = set(tasks) - set(TASKS)
    if synthetic and unknown:
        raise UserError(
            f"--task {', '.join(sorted(unknown))}: no label of synthetic slides",
            f"They have {', '.join(TASKS)}",
        )
    stages = Stages(9 if synthetic else 8)
    if slides is None or labels is None:
        with stages.stage("synthesize slides"):
            cohort = write_cohort(
                workdir / f"cohort-{digest([settings.cohort, settings.size, settings.seed])}",
                slides=settings.cohort,
                size=settings.size,
                seed=settings.seed,
                workers=settings.workers,
            )
        slides, labels, tasks = cohort / "slides", cohort / "labels.csv", tasks or TASKS
    check_labels(labels, tasks)
    with stages.stage("tile"):
        tiled = tile.run(
            slides,
            workdir / "tiles",
            mpp=settings.mpp,
            mpp_csv=mpp_csv,
            workers=settings.workers,
        )
    grid = tiled.grid_dir.name
    made, errors = encode_slides(settings, tiled.grid_dir, workdir / "runs" / grid, stages)
    errors = [*tiled.errors, *errors]
    with stages.stage("cross-validate slide classifiers"):
        results = classify(
            settings, tiled.grid_dir, made.bags, labels, tasks, workdir / "mil" / grid
        )
    out = workdir / "reports" / grid
    with stages.stage("write the report"):
        changed = write_metrics(out / "metrics.json", settings, made, results, errors)
        if changed or not (out / "report.html").exists():
            write_report(
                out / "report.html",
                settings=settings,
                tiled=tiled,
                made=made,
                results=results,
                slides=slides,
                errors=errors,
                synthetic=synthetic,
            )
    total = round(sum(stages.seconds.values()), 1)
    if changed:  # a rerun that found everything done has no times worth keeping
        write_json(out / "timings.json", {"seconds": stages.seconds, "total": total})
    print(f"{total} s in all; {len(errors)} slides with a remark")
    for error in errors:
        print(f"  {error['slide_id']}: {error['reason']}. {error['cure']}")
    return out / "report.html"


def classify(
    settings: Settings,
    grid_dir: Path,
    bags: Bags,
    labels: Path,
    tasks: tuple[str, ...],
    out: Path,
    **training: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Cross-validates each task on each kind of bag: task to bag to the content of metrics.json.

    training: fields of `mil.settings.Settings`.
    """
    colour = mean_colours(grid_dir, settings.mpp)
    return {
        task: {
            bag: mil.run(
                labels=labels,
                task=task,
                out=out,
                name=bag.replace(" ", "-"),
                colour=colour,
                seed=settings.seed,
                **where,
                **training,
            )[task]
            for bag, where in bags.items()
        }
        for task in tasks
    }


def compared(rows: dict[str, Path]) -> list[dict[str, Any]]:
    """What the last kind of bag gains over each of the others, where all tested the same patients."""
    last = list(rows)[-1]
    found = []
    for bag in list(rows)[:-1]:
        with contextlib.suppress(UserError):  # a slide may lack one kind of bag
            found.append({"first": bag, "second": last, **_gain(rows[bag], rows[last])})
    return found


def _gain(first: Path, second: Path) -> dict[str, Any]:
    gained = compare(first, second)
    return {key: gained[key] for key in ("difference", "interval", "permutation_p")}


def write_metrics(
    path: Path, settings: Settings, made: Made, results: dict, errors: list[dict[str, str]]
) -> bool:
    """All figures of a run and nothing that a rerun would change: no times, no paths.

    Returns:
        Whether they are new.
    """
    plain = {
        task: {bag: {k: v for k, v in row.items() if k != "folder"} for bag, row in rows.items()}
        for task, rows in results.items()
    }
    products = {
        role: read_json(run / "product.json")["sha256"]
        for role, run in (("patch", made.patch), ("region", made.region))
    }
    content = {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "workers"},
        "encoders": products,
        "results": plain,
        "errors": [{k: e[k] for k in ("slide_id", "reason", "cure")} for e in errors],
    }
    if path.exists() and read_json(path) == content:
        return False
    write_json(path, content)
    return True


def write_report(
    path: Path,
    *,
    settings: Settings,
    tiled: tile.Tiled,
    made: Made,
    results: dict,
    slides: Path,
    errors: list[dict[str, str]],
    synthetic: bool,
) -> None:
    from pathme_jax.reports import page  # matplotlib is slow to import

    folders = {t: {b: Path(r["folder"]) for b, r in rows.items()} for t, rows in results.items()}

    about = {
        "grid": tiled.grid_dir.name,
        "patch encoder": made.patch.name,
        "region encoder": made.region.name,
        **dataclasses.asdict(settings),
    }
    shown = ("slide_id", "state", "mpp", "fields", "tiles", "regions")
    content = page.Report(
        title="Synthetic two-scale tissue" if synthetic else "Slides, from tissue to prediction",
        synthetic=synthetic,
        results=folders,
        comparisons={task: compared(rows) for task, rows in folders.items()},
        slides=[{**{k: row[k] for k in shown}, "mpp": _short(row["mpp"])} for row in tiled.slides],
        overviews=tiled.grid_dir.parent / "contours",
        thumbnails=tiled.grid_dir.parent / "thumbnails",
        whole_slides=slides,
        errors=errors,
        training={
            "Patch encoder (DINOv2)": made.patch / "metrics.jsonl",
            "Region encoder (PatHME)": made.region / "metrics.jsonl",
        },
        recipe=about,
        versions={**provenance()["versions"], "commit": provenance()["commit"]},
    )
    page.write(path, content)


def _short(mpp: float | str) -> str:
    """µm/px to four digits; empty where a slide has none."""
    return f"{float(mpp):.4g}" if mpp else ""


def check_labels(labels: Path, tasks: tuple[str, ...]) -> None:
    """Before hours of work: is the table there and has it these columns?"""
    if not Path(labels).is_file():
        raise UserError(f"{labels}: no such file", "Give --labels a CSV with case_id, slide_id, …")
    columns = list((read_csv(labels) or [{}])[0])
    for task in tasks:
        if task not in columns:
            raise UserError(f"{labels}: no column {task!r}", f"It has {', '.join(columns)}")
