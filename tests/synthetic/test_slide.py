"""The truth about a synthetic slide: twins, one label apart, differ in that label's scale only."""

import collections

import cv2
import numpy as np
import openslide
import pytest

from pathme_jax.synthetic import slide
from pathme_jax.synthetic.cohort import label_table
from pathme_jax.synthetic.pyramid import write_pyramid
from pathme_jax.synthetic.slide import ARRANGEMENTS, FIELD, SlideSpec, draw_outline, render
from pathme_jax.synthetic.tiles import TILE

SPEC = SlideSpec((5, 79), 2048)  # one field with a hole, one cut by glass, pen on the glass


@pytest.fixture(scope="module")
def twins():
    """Rendered slides by (detail, architecture)."""
    return {labels: render(SPEC, *labels) for labels in [(0, 0), (1, 0), (0, 1)]}


@pytest.fixture(scope="module")
def read_back(twins, tmp_path_factory):
    """The same, written as JPEG pyramids and read with OpenSlide: labels to [level] -> image."""
    folder, images = tmp_path_factory.mktemp("twins"), {}
    for labels, image in twins.items():
        path = folder / f"{labels}.tiff"
        write_pyramid(path, [image[:FIELD], image[FIELD:]], SPEC.size, slide.MPP)
        with openslide.OpenSlide(path) as opened:
            images[labels] = [
                np.array(opened.read_region((0, 0), level, size).convert("RGB"))
                for level, size in enumerate(opened.level_dimensions)
            ]
    return images


def quarter(image):
    """Exact 4x4 area sums, (h/4, w/4, 3)."""
    h, w, c = image.shape
    return image.reshape(h // 4, 4, w // 4, 4, c).sum((1, 3), dtype=np.int64)


def whole_fields(image, outline):
    for row, column in np.argwhere(outline.whole):
        yield image[row * FIELD : (row + 1) * FIELD, column * FIELD : (column + 1) * FIELD]


def tiles(field):
    """Multiset of a field's 16 tiles."""
    rows = field.reshape(4, TILE, 4, TILE, 3).swapaxes(1, 2)
    return collections.Counter(rows[i, j].tobytes() for i, j in np.ndindex(4, 4))


def test_the_twins_show_all_that_can_hide_a_leak():
    outline = draw_outline(SPEC)
    cells = outline.whole.repeat(64, 0).repeat(64, 1)
    assert 1 <= outline.whole.sum() <= 2
    assert outline.pen.max() > 0
    away_from_glass = cv2.distanceTransform((outline.tissue > 0).astype(np.uint8), cv2.DIST_L2, 5)
    assert away_from_glass[cells].min() > 0 and (outline.tissue < 0).any()


def test_detail_is_nowhere_in_the_5x_pixels(twins):
    fine, coarse = twins[0, 0], twins[1, 0]
    np.testing.assert_array_equal(quarter(fine), quarter(coarse))
    assert (fine != coarse).any(-1).mean() > 0.02  # ... and there at 20x


def test_detail_changes_neither_histogram_nor_local_variance(twins):
    fine, coarse = (twins[detail, 0].astype(np.int64) for detail in (0, 1))
    np.testing.assert_array_equal(quarter(fine - coarse), 0)
    # Around equal block means, equal squares: the variance of each 4x4 px block is the same up to
    # what the texture has in common with the tissue under it, which averages out.
    squares = quarter(fine**2), quarter(coarse**2)
    differing = squares[0] != squares[1]
    assert abs((squares[0] - squares[1])[differing].mean()) < 0.01 * squares[0][differing].mean()


def test_detail_is_within_jpeg_noise_at_5x_and_clear_at_20x(twins, read_back):
    fine, coarse = read_back[0, 0], read_back[1, 0]
    for level in range(2, len(fine)):  # 5x and coarser levels of the pyramid: the same bytes
        np.testing.assert_array_equal(fine[level], coarse[level])
    nuclei = (twins[0, 0] != twins[1, 0]).any(-1)
    inside = nuclei.reshape(512, 4, 512, 4).any((1, 3))
    at_5x = (quarter(fine[0]) - quarter(coarse[0]))[inside] / 16
    noise = (quarter(fine[0]) - quarter(twins[0, 0]))[inside] / 16
    # In grey levels. Measured: 0.27 between twins, 0.75 between a slide and its own JPEG.
    assert np.abs(at_5x).mean() < 0.5 * np.abs(noise).mean()
    assert np.abs(at_5x.mean(0)).max() < 0.03
    assert np.abs(fine[0].astype(int) - coarse[0])[nuclei].mean() > 40  # measured 48


def test_architecture_moves_whole_tiles(twins, read_back):
    outline = draw_outline(SPEC)
    pairs = [(twins[0, 0], twins[0, 1]), (read_back[0, 0][0], read_back[0, 1][0])]
    for clustered, dispersed in pairs:  # as drawn, and as JPEG
        for one, other in zip(
            whole_fields(clustered, outline), whole_fields(dispersed, outline), strict=True
        ):
            assert tiles(one) == tiles(other)
            assert (one != other).any()


def test_fields_cut_by_glass_tell_nothing_about_architecture(twins):
    outline = draw_outline(SPEC)
    neutral = ~outline.whole.repeat(FIELD, 0).repeat(FIELD, 1)
    assert neutral.any()
    np.testing.assert_array_equal(twins[0, 0][neutral], twins[0, 1][neutral])


@pytest.mark.parametrize("architecture", [0, 1])
def test_arrangements_are_closed_under_flips_and_turns(architecture):
    known = {np.ascontiguousarray(a).tobytes() for a in ARRANGEMENTS[architecture]}
    assert len(known) == len(ARRANGEMENTS[architecture])
    for arrangement in ARRANGEMENTS[architecture]:
        assert arrangement.sum() == 8
        for turned in (arrangement[::-1], arrangement[:, ::-1], np.rot90(arrangement)):
            assert np.ascontiguousarray(turned).tobytes() in known


def test_arrangements_of_the_classes_differ():
    sets = [{np.ascontiguousarray(a).tobytes() for a in ARRANGEMENTS[k]} for k in (0, 1)]
    assert not sets[0] & sets[1]


def test_nothing_crosses_a_tile_border(twins):
    """Tiles end in stroma: nuclei (dark) keep away from all borders inside whole fields."""
    outline = draw_outline(SPEC)
    for field in whole_fields(twins[0, 1], outline):
        at_border = np.isin(np.arange(FIELD) % TILE, [0, TILE - 1])
        border = field.astype(int).sum(-1)[at_border]
        assert border.min() > np.percentile(field.astype(int).sum(-1), 5)


def test_same_seed_same_slide_other_seed_other_slide():
    spec = SlideSpec((3, 1), 1024)
    first = render(spec, 1, 0)
    np.testing.assert_array_equal(first, render(spec, 1, 0))
    assert (first != render(SlideSpec((3, 2), 1024), 1, 0)).mean() > 0.5
    assert (first != render(SlideSpec((4, 1), 1024), 1, 0)).mean() > 0.5


def test_about_a_third_is_glass_in_one_piece_with_the_edge():
    shares = []
    for seed in range(20):
        outline = draw_outline(SlideSpec((seed,), 4096))
        shares.append((outline.tissue < 0).mean())
        assert 4 <= outline.whole.sum() <= 10
        cells = outline.whole.repeat(64, 0).repeat(64, 1)
        assert outline.tissue[cells].min() > 4  # whole means whole, soft edge included
        assert not (outline.pen[outline.tissue > 0] > 0).any()  # pen stays on the glass
    assert 0.15 < np.mean(shares) < 0.4


def permutation_p(colour, label, rng, times=999):
    """Share of label shuffles over cases that separate mean colours (c, 3) at least as well."""

    def distance(y):
        return np.linalg.norm((colour[y == 1].mean(0) - colour[y == 0].mean(0)) / colour.std(0))

    shuffled = [distance(rng.permutation(label)) for _ in range(times)]
    return (1 + np.sum(np.array(shuffled) >= distance(label))) / (1 + times)


def test_colour_tells_no_label():
    rows = label_table(40, seed=0, slides_per_case=2)
    colour = np.stack(
        [
            render(SlideSpec((0, i), 1024), row["detail"], row["architecture"]).mean((0, 1))
            for i, row in enumerate(rows)
        ]
    )
    by_case = colour.reshape(20, 2, 3).mean(1)
    rng = np.random.default_rng(0)
    for label in ("detail", "architecture", "subtype"):
        truth = np.array([row[label] for row in rows[::2]])
        assert permutation_p(by_case, truth, rng) > 0.01, label
        # The test has teeth: a shift of two standard deviations would be seen.
        shifted = by_case + 2 * by_case.std(0) * truth[:, None]
        assert permutation_p(shifted, truth, rng) < 0.01, label
