"""Tissue is found, glass, specks and pen are not; the user's outlines stand."""

import json

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathme_jax.errors import UserError
from pathme_jax.slides import tissue

MM2 = (tissue.RECIPE["mpp"] / 1000) ** 2  # of a mask pixel
PINK, GLASS = (205, 140, 185), (243, 243, 245)


def glass(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 3, (300, 300, 3))
    return np.clip(np.array(GLASS) + noise, 0, 255).astype(np.uint8)


def disc(image: np.ndarray, x: int, y: int, radius: int, colour) -> np.ndarray:
    return cv2.circle(image, (x, y), radius, colour, -1)


def test_a_blank_slide_has_none():
    for seed in range(3):
        assert not tissue.segment(glass(seed)).any()
    assert not tissue.segment(np.zeros((200, 200, 3), np.uint8)).any(), "never scanned"


def test_tissue_is_found_to_within_its_rim():
    mask = tissue.segment(disc(glass(), 150, 150, 80, PINK))
    assert mask.sum() == pytest.approx(np.pi * 80**2, rel=0.05)


def test_pale_tissue_is_found_beside_strong_tissue():
    """Otsu alone would split strong from pale."""
    image = disc(disc(glass(), 80, 150, 60, (150, 60, 130)), 220, 150, 60, (236, 212, 228))
    mask = tissue.segment(image)
    assert mask[150, 80] and mask[150, 220] and not mask[20, 20]


def test_a_slide_full_of_tissue_stays_whole():
    rng = np.random.default_rng(0)
    image = np.clip(np.array(PINK) + rng.normal(0, 15, (300, 300, 3)), 0, 255).astype(np.uint8)
    assert tissue.segment(image).mean() > 0.99


def test_large_holes_are_glass_small_ones_and_specks_are_filled_in():
    image = disc(glass(), 150, 150, 110, PINK)
    disc(image, 110, 150, 25, GLASS)  # 0.13 mm²: a hole
    disc(image, 200, 150, 7, GLASS)  # 0.01 mm²: a lumen
    disc(image, 20, 20, 8, PINK)  # 0.01 mm²: a speck
    mask = tissue.segment(image)
    assert not mask[150, 110] and mask[150, 200] and not mask[20, 20]


@pytest.mark.parametrize("ink", [(64, 89, 191), (51, 153, 89), (64, 64, 71), (20, 20, 20)])
def test_pen_is_not_tissue(ink):
    image = disc(glass(), 90, 150, 60, PINK)
    cv2.line(image, (230, 20), (230, 280), ink, 24)
    mask = tissue.segment(image)
    assert mask[150, 90] and not mask[:, 190:].any()


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.5, 0.5044]))
def test_outlines_give_the_mask_back(seed, mpp):
    noise = np.random.default_rng(seed).random((40, 50), np.float32)
    mask = cv2.GaussianBlur(noise, (9, 9), 0) > 0.5
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((4, 4))) > 0
    size = (round(50 * 8 / mpp), round(40 * 8 / mpp))
    assert (tissue.rasterise(tissue.outlines(mask, mpp), size, mpp) == mask).all()


def test_overlapping_polygons_add_up():
    square = np.array([[0, 0], [320, 0], [320, 320], [0, 320]])
    mask = tissue.rasterise([[square], [square + 160]], (640, 640), 0.5)
    assert mask[15, 15]


def test_ours_is_reused_for_the_same_slide_and_recipe_only(tmp_path, monkeypatch):
    path = tmp_path / "a.geojson"
    assert not tissue.reusable(path, {"size": 1})
    tissue.write(path, tissue.outlines(np.ones((9, 9), bool), 0.5), {"size": 1})
    assert tissue.reusable(path, {"size": 1})
    assert not tissue.reusable(path, {"size": 2})
    monkeypatch.setitem(tissue.RECIPE, "min_hole", 1.0)
    assert not tissue.reusable(path, {"size": 1})


@pytest.mark.parametrize("keep_mark", [True, False])
def test_an_edited_file_stands_whatever_the_recipe(tmp_path, keep_mark, monkeypatch):
    path = tmp_path / "a.geojson"
    tissue.write(path, tissue.outlines(np.ones((9, 9), bool), 0.5), {})
    content = json.loads(path.read_text())
    content["features"][0]["geometry"]["coordinates"][0][1] = [7, 7]
    if not keep_mark:  # QuPath drops members it does not know
        del content["pathme_jax"]
    path.write_text(json.dumps(content))
    monkeypatch.setitem(tissue.RECIPE, "min_hole", 1.0)
    assert tissue.reusable(path, {"size": 2})


def test_reads_collections_lists_single_features_and_multipolygons(tmp_path):
    ring = [[0, 0], [9, 0], [9, 9], [0, 0]]
    polygon = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring, ring]}}
    multi = {
        "type": "Feature",
        "geometry": {"type": "MultiPolygon", "coordinates": [[ring], [ring]]},
    }
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    for content, rings in (
        ({"type": "FeatureCollection", "features": [polygon, multi, point]}, [2, 1, 1]),
        ([polygon], [2]),
        (multi, [1, 1]),
        ({"type": "FeatureCollection", "features": []}, []),
    ):
        (tmp_path / "a.geojson").write_text(json.dumps(content))
        assert [len(p) for p in tissue.read(tmp_path / "a.geojson")] == rings


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "3",
        '{"features": [1]}',
        '{"features": [{"geometry": {"type": "Polygon", "coordinates": [1]}}]}',
    ],
)
def test_what_is_no_geojson_is_an_error_with_a_cure(tmp_path, text):
    (tmp_path / "a.geojson").write_text(text)
    with pytest.raises(UserError, match=r"a\.geojson: not a GeoJSON") as caught:
        tissue.read(tmp_path / "a.geojson")
    assert "QuPath" in caught.value.cure
