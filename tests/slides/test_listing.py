"""Which files count as slides, and what a user's CSV may say."""

import pytest

from pathme_jax.errors import UserError
from pathme_jax.slides.listing import find_slides, fingerprint


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_a_folder_gives_its_whole_slide_files_by_id(tmp_path):
    folder = touch(tmp_path / "s", "b.svs", "a.TIFF", "notes.txt", "labels.csv", "c.ndpi")
    assert [s.slide_id for s in find_slides(folder)] == ["a", "b", "c"]


def test_a_csv_gives_paths_relative_to_it_and_mpp(tmp_path):
    touch(tmp_path / "s", "a.svs", "b.svs")
    (tmp_path / "list.csv").write_text("wsi,mpp\ns/b.svs,\ns/a.svs,0.25\n")
    a, b = find_slides(tmp_path / "list.csv")
    assert (a.path, a.mpp) == (tmp_path / "s/a.svs", 0.25)
    assert (b.slide_id, b.mpp) == ("b", None)


@pytest.mark.parametrize("text", ["wsi,mpp\na.1.svs,0.3\n", "slide_id,mpp\na.1,0.3\n"])
def test_mpp_csv_goes_first_and_takes_names_with_dots(tmp_path, text):
    (tmp_path / "list.csv").write_text("path,mpp\na.1.svs,0.25\n")
    (tmp_path / "mpp.csv").write_text(text)
    (slide,) = find_slides(tmp_path / "list.csv", tmp_path / "mpp.csv")
    assert (slide.slide_id, slide.mpp) == ("a.1", 0.3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file\na.svs\n", "no column wsi or slide or path .found file"),
        ("wsi\n", "no rows"),
        ("wsi,mpp\na.svs,fast\n", "'fast'"),
        ("wsi,mpp\na.svs,40\n", "'40'"),
        ("wsi\na.svs\nb/a.tiff\n", "both be slide a"),
    ],
)
def test_a_bad_csv_says_what_is_wrong(tmp_path, text, says):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        find_slides(tmp_path / "list.csv")


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no whole-slide file"):
        find_slides(touch(tmp_path / "s", "notes.txt"))
    with pytest.raises(UserError, match="no such folder"):
        find_slides(tmp_path / "absent")
    with pytest.raises(UserError, match="no such file"):
        find_slides(touch(tmp_path / "s", "a.svs"), tmp_path / "absent.csv")


def test_fingerprint_sees_size_head_and_tail(tmp_path):
    path = tmp_path / "a.svs"
    body = bytearray(300_000)
    prints = []
    for at, length in ((0, 300_000), (5, 300_000), (299_999, 300_000), (0, 299_999)):
        changed = body.copy()
        changed[at] = 1
        path.write_bytes(changed[:length])
        prints.append(str(fingerprint(path)))
    assert len(set(prints)) == 4
