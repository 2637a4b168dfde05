"""Weights of another run in place of random ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dinov2_tiny, pathme_tiny
from pathme_jax.encoders import encoder, patch
from pathme_jax.encoders.zoo import Definition, Input
from pathme_jax.errors import UserError
from pathme_jax.models.resample import resize_positions
from pathme_jax.training import initial
from pathme_jax.training.initial import put

FOLLOWS = {"teacher/b/w": "student/b/w", "teacher/b/positions": "student/b/positions"}


def state() -> dict:
    trained = {
        "student/b/w": jnp.zeros((2, 3)),
        "student/b/positions": jnp.zeros((4, 4, 3)),
        "student/head/w": jnp.zeros(5),
    }
    return {"trained": trained, "ema": {t: trained[s] for t, s in FOLLOWS.items()}, "step": 0}


def weights(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"student/b/w": (2, 3), "student/b/positions": (4, 4, 3), **changes}
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def test_student_and_teacher_start_there_and_the_rest_as_drawn():
    given = weights()
    found = put(state(), given, FOLLOWS, "student/b")
    for path, value in given.items():
        np.testing.assert_array_equal(found["trained"][path], value)
        np.testing.assert_array_equal(found["ema"][path.replace("student", "teacher")], value)
    assert (found["trained"]["student/head/w"] == 0).all()


def test_positions_of_another_grid_are_interpolated():
    given = weights(**{"student/b/positions": (8, 8, 3)})
    found = put(state(), given, FOLLOWS, "student/b")
    expected = resize_positions(jnp.asarray(given["student/b/positions"]), (4, 4))
    np.testing.assert_allclose(found["trained"]["student/b/positions"], expected, atol=1e-6)
    np.testing.assert_allclose(found["ema"]["teacher/b/positions"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"student/b/w": (2, 3)}, "missing.*student/b/positions"),
        ({"student/b/more": (1,)}, "unknown.*student/b/more"),
        ({"student/b/w": (2, 4)}, r"student/b/w has shape \(2, 4\), the model's is \(2, 3\)"),
        ({"student/b/positions": (4, 4, 5)}, "positions has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(given, said):
    given = weights(**given) if len(given) == 1 and "missing" not in said else weights()
    if "missing" in said:
        del given["student/b/positions"]
    with pytest.raises(UserError, match=said):
        put(state(), given, FOLLOWS, "student/b")


def test_a_converted_encoder_is_a_start_and_its_licence_goes_with_the_run(tmp_path):
    definition = Definition(
        "uni",
        dict(patch=8, width=16, depth=1, heads=2, layer_scale=0.0, grid=4),
        Input(),
        positions="patches",
        licence="CC-BY-NC-ND-4.0",
        source="MahmoodLab/UNI",
    )
    shapes = patch.abstract(definition)
    params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    row = {"name": "uni", "licence": "CC-BY-NC-ND-4.0", "terms": "no derivatives"}
    name = encoder.save(tmp_path / "uni", definition, params, made_from=[row])
    config = dinov2_tiny.get_config()
    config.initial = dict(into="student/backbone", path=str(tmp_path / "uni"))

    hashed = initial.hashes(config, None)["student/backbone"]
    assert hashed == encoder.load(tmp_path / "uni").about["sha256"]
    given = initial.weights(config)
    assert given["student/backbone/positions"].shape == (4, 4, 16)
    assert not [path for path in given if "backbone/backbone" in path]
    own = {"name": name, "sha256": hashed, "licence": row["licence"], "terms": ""}
    assert initial.made_from(config) == [row, {**own, "source": "MahmoodLab/UNI"}]


def test_a_run_on_features_depends_on_the_encoders_they_came_from():
    config = pathme_tiny.get_config()
    config.columns = dict(
        fine="uni-1a2b3c4d@20x", coarse="uni-1a2b3c4d@5x", experts={"hed": "hed_texture@20x"}
    )
    found = initial.made_from(config)
    assert [x["name"] for x in found] == ["hed_texture", "uni-1a2b3c4d"]
    assert found[1]["licence"] == "CC-BY-NC-ND-4.0" and "ask them" in found[1]["terms"]
