"""The TIFFs open in OpenSlide as slides of exactly 0.5 µm/px with exactly halved levels."""

import numpy as np
import openslide
import pytest
import tifffile

from pathme_jax.synthetic.pyramid import write_pyramid


def picture(size):
    """Smooth colours, which JPEG keeps, under a checkerboard of pixels, which no mean keeps."""
    y, x = np.mgrid[:size, :size]
    checks = 20 * ((x + y) % 2)
    y, x = y / size, x / size
    colour = np.stack([120 + 90 * np.sin(6 * x), 60 + 130 * y, 200 - 90 * x * y], -1)
    return (colour + checks[..., None]).astype(np.uint8)


@pytest.mark.parametrize("size", [1024, 3072])  # 3072: the last level ends in part of a tile
def test_openslide_reads_every_level(tmp_path, size):
    image, path = picture(size), tmp_path / "a.tiff"
    write_pyramid(path, (image[y : y + 1024] for y in range(0, size, 1024)), size, 0.5)
    with openslide.OpenSlide(path) as slide:
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        assert float(slide.properties["openslide.mpp-y"]) == 0.5
        downsamples = tuple(2.0**k for k in range(len(slide.level_dimensions)))
        assert slide.level_downsamples == downsamples
        assert 256 <= slide.level_dimensions[-1][0] < 512
        for level, (width, height) in enumerate(slide.level_dimensions):
            read = np.array(slide.read_region((0, 0), level, (width, height)).convert("RGB"))
            step = 2**level
            exact = image.reshape(height, step, width, step, 3).mean((1, 3))
            off = read - exact  # measured: 1.6 and at most 10 at level 0, less below
            assert np.abs(off).mean() < (2 if level == 0 else 1), level
            assert np.abs(off).max() < 15, level
    with tifffile.TiffFile(path) as tiff:
        assert all(page.is_tiled and page.tile == (256, 256) for page in tiff.pages)
        assert [page.subfiletype for page in tiff.pages] == [0] + [1] * (len(downsamples) - 1)


def test_a_slide_that_fails_half_way_leaves_nothing(tmp_path):
    def rows():
        yield picture(2048)[:1024]
        raise RuntimeError("drawing failed")

    with pytest.raises(RuntimeError, match="drawing failed"):
        write_pyramid(tmp_path / "a.tiff", rows(), 2048, 0.5)
    assert list(tmp_path.iterdir()) == []
