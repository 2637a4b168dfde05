"""Tiling end to end on tiny slides: right pixels, every outcome in its table, resumable, deterministic."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import tifffile

from data_prep.tile import main
from pathme_jax.errors import UserError
from pathme_jax.records.fields import FieldSource, ViewSource, decode, encode
from pathme_jax.slides import tissue
from pathme_jax.slides.preview import preview
from pathme_jax.slides.tile import Tiled, run

ROOT = Path(__file__).parents[2]
SMALL = {"field_px": 128, "tile_px": 32}  # a field is 64 µm, a region 256 µm at 0.5 µm/px


def tile(slides: Path, out: Path, **changes) -> Tiled:
    return run(slides, out, **{"workers": 0, "progress": False, **SMALL, **changes})


def states(tiled: Tiled) -> dict[str, str]:
    return {row["slide_id"]: row["state"] for row in tiled.slides}


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the table that holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "slides.csv"
    }


def written(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_fields_are_the_slides_own_pixels_where_its_level_fits(tmp_path, slides, paint):
    tiled = tile(slides, tmp_path / "out")
    assert states(tiled) == {"a": "done", "b": "done"}
    source = FieldSource(tiled.grid_dir)
    assert len(source) == 2 * 8 * 6, "8 rows; tissue reaches into the sixth column of eight"
    image = paint(1)
    for index in source.ranges["b"]:
        record = source[index]
        row, col = record["grid"]
        crop = image[row * 128 : row * 128 + 128, col * 128 : col * 128 + 128]
        assert record["image"] == encode(crop)
        assert record["level0_xy"].tolist() == [col * 128, row * 128]
        assert record["level0_size"].tolist() == [128, 128]
    assert [tuple(source[i]["grid"]) for i in source.ranges["b"]] == [
        (row, col) for row in range(8) for col in range(6)
    ]


def test_tissue_tiles_are_those_the_tissue_covers(tmp_path, slides):
    source = FieldSource(tile(slides, tmp_path / "out").grid_dir)
    for index in source.ranges["a"]:
        record = source[index]
        # tissue ends at 660 px, 20.6 tiles; the mask's rim is loose by a pixel, half a tile here
        columns = record["grid"][1] * 4 + np.arange(4)
        assert record["tissue"][:, columns < 20].all()
        assert not record["tissue"][:, columns > 20].any()


def test_views_are_area_averages_of_the_region_glass_included(tmp_path, slides, paint):
    tiled = tile(slides, tmp_path / "out")
    views = ViewSource(tiled.grid_dir)
    assert [tuple(views[i]["grid"]) for i in views.ranges["a"]] == [(0, 0), (0, 4), (4, 0), (4, 4)]
    view = views[views.ranges["a"][1]]
    assert view["mpp"] == 1.0 and view["level0_size"].tolist() == [512, 512]
    half = cv2.resize(paint(0)[:512, 512:1024], (256, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(decode(view["image"]).astype(int) - half).mean() < 2
    assert view["fields"].tolist() == [[True, True, False, False]] * 4


def test_a_coarser_mpp_is_read_from_a_coarser_level_and_shares_the_outlines(tmp_path, slides):
    at_half = tile(slides, tmp_path / "out")
    before = written(tmp_path / "out")
    at_one = tile(slides, tmp_path / "out", mpp=1.0)
    after = written(tmp_path / "out")
    assert {path: after[path] for path in before} == before, "0.5 µm/px and the outlines stay"
    assert at_one.grid_dir.name.startswith("10x-") and at_half.grid_dir.name.startswith("20x-")
    assert {Path(p).parents[0].name for p in set(after) - set(before)}.isdisjoint(
        {"contours", "contours_geojson", "thumbnails"}
    )
    record = FieldSource(at_one.grid_dir)[0]
    with tifffile.TiffFile(slides / "a.tiff") as file:
        level1 = file.pages[1].asarray()
    assert record["image"] == encode(level1[:128, :128])
    tile(slides, tmp_path / "out")
    assert written(tmp_path / "out").items() >= {
        (p, t) for p, t in after.items() if not p.endswith(".csv")
    }, "going back redoes nothing"


def test_odd_mpp_is_resampled_to_the_exact_field(tmp_path, paint, write_tiff):
    write_tiff(tmp_path / "s" / "a.tiff", paint(), mpp=0.47)
    source = FieldSource(tile(tmp_path / "s", tmp_path / "out").grid_dir)
    first, second = source[0], source[1]
    assert second["level0_xy"].tolist() == [round(64 / 0.47), 0]
    assert first["level0_size"].tolist() == [136, 136]
    expected = cv2.resize(paint()[:136, :136], (128, 128), interpolation=cv2.INTER_AREA)
    assert first["image"] == encode(expected)


def test_trident_reads_the_coordinates_of_the_tissue_tiles(tmp_path, slides):
    tiled = tile(slides, tmp_path / "out")
    source = FieldSource(tiled.grid_dir)
    tiles = sum(int(source[i]["tissue"].sum()) for i in source.ranges["a"])
    folder = tiled.grid_dir / "20x_32px_0px_overlap" / "patches"
    with h5py.File(folder / "a_patches.h5") as file:
        coords, attrs = file["coords"][:], dict(file["coords"].attrs)
    assert len(coords) == tiles == tiled.slides[0]["tiles"]
    assert (coords % 32 == 0).all() and len(np.unique(coords, axis=0)) == tiles
    assert attrs["patch_size"] == attrs["patch_size_level0"] == 32
    assert attrs["target_magnification"] == 20


def bad_slides(folder: Path, paint, write_tiff) -> None:
    whole = write_tiff(folder / "good.tiff", paint(), compression="jpeg")
    data = bytearray(whole.read_bytes())
    with tifffile.TiffFile(whole) as file:
        page = file.pages[0]
        start, length = page.dataoffsets[22], page.databytecounts[22]
    data[start : start + length] = bytes(length)
    (folder / "corrupt.tiff").write_bytes(data)
    (folder / "cut.tiff").write_bytes(whole.read_bytes()[:9000])
    write_tiff(folder / "nompp.tiff", paint(), mpp=None)
    write_tiff(folder / "coarse.tiff", paint(), mpp=1.0)
    write_tiff(folder / "glass.tiff", np.full((1100, 1100, 3), 243, np.uint8))
    write_tiff(folder / "small.tiff", paint()[:500])
    write_tiff(folder / "tiny.tiff", paint()[:100, :1000], levels=1)


def test_every_bad_slide_is_listed_with_its_cure_and_stops_no_other(tmp_path, paint, write_tiff):
    bad_slides(tmp_path / "s", paint, write_tiff)
    tiled = tile(tmp_path / "s", tmp_path / "out")
    assert states(tiled) == {
        **dict.fromkeys(["coarse", "corrupt", "cut", "glass", "nompp", "tiny"], "failed"),
        **{"good": "done", "small": "no_region"},
    }
    errors = {row["slide_id"]: row for row in table(tiled.grid_dir / "errors.csv")}
    for slide, reason, cure in (
        ("coarse", "too coarse", "--mpp 1"),
        ("corrupt", "cannot be read", "Copy it again"),
        ("cut", "cannot be read", "Copy it again"),
        ("glass", "no tissue found", "--tissue"),
        ("nompp", "does not state its µm/px", "--mpp-csv"),
        ("small", "smaller than a region (550 × 250 µm, a region is 256 µm): tile", "Nothing"),
        ("tiny", "smaller than a field", "--mpp"),
    ):
        assert reason in errors.pop(slide)["reason"] and cure in str(tiled)
    assert not errors
    left = {path.stem for path in (tiled.grid_dir / "fields").iterdir()}
    assert left == {"good", "small"}
    assert FieldSource(tiled.grid_dir).slide_ids == ["good", "small"]
    assert ViewSource(tiled.grid_dir).slide_ids == ["good"]


def test_a_missing_mpp_is_cured_by_the_csv(tmp_path, paint, write_tiff):
    write_tiff(tmp_path / "s" / "a.tiff", paint(), mpp=None)
    with pytest.raises(UserError, match=r"none of the 1 slides.*mpp-csv.*errors\.csv"):
        tile(tmp_path / "s", tmp_path / "out")
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na.tiff,0.5\n")
    tiled = tile(tmp_path / "s", tmp_path / "out", mpp_csv=tmp_path / "mpp.csv")
    assert states(tiled) == {"a": "done"}
    (tmp_path / "mpp.csv").write_text("wsi,mpp\na.tiff,0.45\n")
    tiled = tile(tmp_path / "s", tmp_path / "out", mpp_csv=tmp_path / "mpp.csv")
    assert FieldSource(tiled.grid_dir)[0]["slide_mpp"] == pytest.approx(0.45), (
        "another mpp is another slide"
    )


def test_a_rerun_writes_nothing_but_the_tables_and_keeps_the_seconds(tmp_path, slides):
    first = tile(slides, tmp_path / "out")
    before = written(tmp_path / "out")
    again = tile(slides, tmp_path / "out")
    after = written(tmp_path / "out")
    assert {p for p in after if after[p] != before.get(p)} == {
        str(first.grid_dir / "errors.csv"),
        str(first.grid_dir / "slides.csv"),
    }
    assert [float(r["seconds"]) for r in again.slides] == [r["seconds"] for r in first.slides]


def test_a_changed_slide_outline_or_lost_shard_is_redone_alone(tmp_path, slides, paint, write_tiff):
    out = tmp_path / "out"
    grid_dir = tile(slides, out).grid_dir
    whole = tree(out)

    def redone() -> set[str]:
        before = written(grid_dir / "fields")
        tile(slides, out)
        after = written(grid_dir / "fields")
        return {Path(p).stem for p in after if after[p] != before.get(p)}

    assert redone() == set()
    shard = grid_dir / "fields" / "a.array_record"
    shard.unlink()
    assert redone() == {"a"}
    os.truncate(grid_dir / "views" / "b.array_record", 100)
    assert redone() == {"b"}
    assert tree(out) == whole

    outline = out / "contours_geojson" / "a.geojson"
    content = json.loads(outline.read_text())
    square = [[0, 0], [250, 0], [250, 250], [0, 250], [0, 0]]
    content["features"][0]["geometry"]["coordinates"] = [square]
    outline.write_text(json.dumps(content))
    assert redone() == {"a"}
    source = FieldSource(grid_dir)
    assert [tuple(source[i]["grid"]) for i in source.ranges["a"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert json.loads(outline.read_text()) == content, "the user's outline stands"

    write_tiff(slides / "b.tiff", paint(7))
    assert redone() == {"b"}
    assert FieldSource(grid_dir)[4]["image"] == encode(paint(7)[:128, :128])


def test_outlines_are_brought_in(tmp_path, slides):
    ring = [[0, 0], [120, 0], [120, 120], [0, 120], [0, 0]]
    theirs = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}]
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="no outline of any"):
        tile(slides, tmp_path / "out", tissue_dir=tmp_path / "mine")
    (tmp_path / "mine" / "a.geojson").write_text(json.dumps(theirs))
    tiled = tile(slides, tmp_path / "out", tissue_dir=tmp_path / "mine")
    assert [row["fields"] for row in tiled.slides] == [1, 48]


@pytest.mark.parametrize(("min_tissue", "tiles"), [(0.2, 49), (0.5, 48), (0.6, 36)])
def test_a_tile_counts_from_the_share_of_tissue_asked_for(tmp_path, slides, min_tissue, tiles):
    """An outline of 6.5 tiles a side: 36 whole tiles, 12 halves and a quarter."""
    ring = [[0, 0], [200, 0], [200, 200], [0, 200], [0, 0]]
    theirs = [{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.geojson").write_text(json.dumps(theirs))
    tiled = tile(slides, tmp_path / "out", tissue_dir=tmp_path / "mine", min_tissue=min_tissue)
    assert tiled.slides[0]["tiles"] == tiles


def test_a_slide_gone_bad_leaves_nothing_of_its_earlier_self(tmp_path, slides):
    grid_dir = tile(slides, tmp_path / "out").grid_dir
    (slides / "a.tiff").write_bytes(b"gone bad")
    tile(slides, tmp_path / "out")
    left = {path.stem.split("_")[0] for path in grid_dir.rglob("*") if path.parent != grid_dir}
    assert FieldSource(grid_dir).slide_ids == ["b"] and "a" not in left


def test_another_recipe_goes_beside(tmp_path, slides, monkeypatch):
    names = {tile(slides, tmp_path / "out").grid_dir.name}
    for change in ({"min_tissue": 0.5}, {"region_stride": 2}, {"max_upsample": 1.0}):
        names.add(tile(slides, tmp_path / "out", **change).grid_dir.name)
    monkeypatch.setitem(tissue.RECIPE, "min_hole", 0.5)
    names.add(tile(slides, tmp_path / "out").grid_dir.name)
    assert len(names) == 5


@pytest.mark.parametrize(
    "bad",
    [{"mpp": 0}, {"field_px": 1000}, {"min_tissue": 0}, {"region_stride": 0}, {"max_upsample": 9}],
)
def test_wrong_arguments_are_named(tmp_path, slides, bad):
    with pytest.raises(UserError, match=next(iter(bad)).replace("_", "-")):
        tile(slides, tmp_path / "out", **bad)


def test_a_full_disk_ends_the_run_with_one_line_and_a_rerun_finishes(
    tmp_path, slides, monkeypatch, capsys
):
    class Full:
        def __init__(self, *_): ...
        def write(self, *_): ...
        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing x")

    arguments = ["--slides", str(slides), "--out", str(tmp_path / "out"), "--workers", "0"]
    arguments += ["--field-px", "128", "--tile-px", "32"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("pathme_jax.records.fields.ArrayRecordWriter", Full)
        main(arguments)
    assert end.value.code == 2
    assert "no space left writing" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("fields/*.json"))
    main(arguments)
    assert "2 of 2 slides tiled, 96 fields" in capsys.readouterr().out


def test_dry_run_tells_and_writes_nothing(tmp_path, paint, write_tiff):
    bad_slides(tmp_path / "s", paint, write_tiff)
    lines = preview(tmp_path / "s", tmp_path / "out", workers=0, **SMALL).splitlines()
    words = {line.split()[0]: line for line in lines}
    assert (
        words["good"].split()[1:]
        == "to do 0.5 0 (0.5 µm) 8 × 8 48".split() + (words["good"].split()[-2:])
    )
    assert "too coarse" in words["coarse"] and "no tissue" in words["glass"]
    assert not (tmp_path / "out").exists()
    tiled = tile(tmp_path / "s", tmp_path / "out")
    good = next(row for row in tiled.slides if row["slide_id"] == "good")
    assert words["good"].split()[-2:] == [str(good["tiles"]), str(good["regions"])]
    again = preview(tmp_path / "s", tmp_path / "out", workers=0, **SMALL)
    assert [line.split()[1] for line in again.splitlines() if line.startswith("good")] == ["done"]


def command(slides: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "data_prep.tile", "--slides", str(slides), "--out", str(out)),
        *("--workers", "2", "--field-px", "128", "--tile-px", "32"),
    ]


def test_killed_at_any_moment_it_resumes_to_the_same_bytes_and_leaves_no_worker(
    tmp_path, paint, write_tiff
):
    slides = tmp_path / "s"
    for i in range(4):
        write_tiff(slides / f"{i}.tiff", paint(i))
    tile(slides, tmp_path / "whole")

    out = tmp_path / "out"
    for wanted in ("contours_geojson/*", "*/fields/*.json"):
        process = subprocess.Popen(command(slides, out), cwd=ROOT, stderr=subprocess.DEVNULL)
        while not list(out.glob(wanted)) and process.poll() is None:
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        end = time.monotonic() + 20
        while any(Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < end:
            time.sleep(0.1)
        assert not [w for w in workers if Path(f"/proc/{w}").exists()]
    subprocess.run(command(slides, out), cwd=ROOT, check=True, capture_output=True)
    assert {name: data for name, data in tree(out).items() if ".tmp" not in name} == tree(
        tmp_path / "whole"
    ), "whether in one process or two, killed or not"


def test_no_heavy_import_and_quick_help():
    code = (
        "import sys, data_prep.tile, pathme_jax.slides.preview, tensorflow_datasets;"
        "assert not {'jax', 'tensorflow', 'torch', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    code = "import sys, data_prep.tile; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_real_slides(tmp_path):
    """The small files of ../shared/data: one too small for a region, one without mpp, one too coarse."""
    shared = Path(os.environ.get("PATHME_SHARED", ROOT.parent / "shared" / "data"))
    names = ["CMU-1-Small-Region.svs", "TCGA-CR-7395-no-mpp.svs", "tubularadenoma-flat-10x.tiff"]
    if not (shared / "slides").exists():
        pytest.skip(f"{shared}/slides is absent; set PATHME_SHARED")
    (tmp_path / "s").mkdir()
    for name in names:
        (tmp_path / "s" / name).symlink_to((shared / "slides" / name).resolve())
    tiled = run(tmp_path / "s", tmp_path / "out", workers=0, progress=False)
    assert list(states(tiled).values()) == ["no_region", "failed", "failed"]
    (row,) = FieldSource(tiled.grid_dir).ranges.values()
    assert len(row) == 4
    coarse = run(tmp_path / "s", tmp_path / "out", workers=0, progress=False, mpp=1.0)
    assert list(states(coarse).values()) == ["no_region", "failed", "done"]
    assert coarse.slides[2]["regions"] == 1
