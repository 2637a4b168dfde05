"""The contact sheet shows every picture of every kind, whatever their sizes."""

import cv2
import numpy as np

from pathme_jax.training.pictures import save_views

COLOURS = {"global 1": (1.5, 0.0, 0.0), "local": (0.0, 1.0, -0.5)}  # beyond 0..1 on purpose


def test_every_picture_is_there_in_its_row(tmp_path, caplog):
    red = np.ones((2, 24, 24, 3)) * COLOURS["global 1"]
    green = np.ones((5, 10, 10, 3)) * COLOURS["local"]
    path = save_views(tmp_path / "run", {"global 1": red, "local": green})
    sheet = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert sheet is not None and path == tmp_path / "run" / "views.png"
    assert [p.name for p in path.parent.iterdir()] == ["views.png"]  # nothing temporary is left
    assert not caplog.records  # Matplotlib says so where it has to clip
    places = {}
    for kind, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
        at = (sheet == colour).all(-1).astype(np.uint8)
        stats = cv2.connectedComponentsWithStats(at)[2]
        pictures = stats[1:][stats[1:, cv2.CC_STAT_AREA] > 500]
        places[kind] = pictures
        assert len(pictures) == {"red": 2, "green": 5}[kind]
    sides = [place[:, cv2.CC_STAT_WIDTH] for place in places.values()]
    assert abs(np.concatenate(sides) - sides[0][0]).max() <= 2  # all shown at one size
    assert places["red"][:, cv2.CC_STAT_TOP].max() < places["green"][:, cv2.CC_STAT_TOP].min()
