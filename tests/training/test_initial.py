"""Weights of another run in place of random ones."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.errors import UserError
from pathme_jax.models.transformer import resize_positions
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
