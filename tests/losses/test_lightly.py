"""DINO, iBOT, KoLeo and Sinkhorn against lightly's, to 1e-5 in fp32.

`stored` are the answers of the version named in the file; `live` asks the installed lightly, if any.
Where lightly computes something else than METHODS 1.2, the difference is at most of the order of its
epsilon: KoLeo adds 1e-8 to each coordinate of a difference, not only to its length; an image without
masked tokens counts as if it had one, of weight nothing. Its Sinkhorn is SwAV's, which does not divide
by the number of prototypes and overflows for large logits; the result is the same.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.losses import self_distillation as ssl
from pathme_jax.training.schedules import cosine
from pathme_jax.views.masks import MaskPlan, _paint

MAKE = runpy.run_path(str(Path(__file__).parents[1] / "references" / "make_ssl.py"))
TEMPERATURE = MAKE["TEACHER_TEMPERATURE"]


@pytest.fixture(scope="module", params=["stored", "live"])
def lightly(request):
    if request.param == "stored":
        return json.loads(MAKE["STORED"].read_text())
    pytest.importorskip("lightly")
    return MAKE["answers"]()


@pytest.fixture(scope="module")
def given():
    return {name: jnp.asarray(value) for name, value in MAKE["inputs"]().items()}


def _agree(ours, theirs):
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-5, atol=1e-5)


def test_dino_over_all_pairs_of_different_views(lightly, given):
    """Two teacher views, the same two and three local ones of the student: 2 + 2 * 3 terms."""

    def loss(student):
        target = ssl.centred_softmax(given["teacher"], given["centre"], TEMPERATURE)
        pairs = ssl.cross_entropy(student[:, None], target[None]).mean(-1)
        return (pairs.sum() - jnp.trace(pairs)) / (pairs.size - 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(given["student"])
    _agree(value, lightly["dino"])
    _agree(slope, lightly["dino_gradient"])


def test_ibot_weighs_each_image_alike_whatever_its_masked_tokens(lightly, given):
    masked = given["mask"].reshape(3, -1)
    weight = (1.0 / jnp.maximum(masked.sum(1), 1))[jnp.nonzero(masked)[0]]

    def loss(student):
        target = ssl.centred_softmax(given["patch_teacher"], given["centre"], TEMPERATURE)
        return (ssl.cross_entropy(student, target) * weight).sum() / len(masked)

    value, slope = jax.jit(jax.value_and_grad(loss))(given["patch_student"])
    _agree(value, lightly["ibot"])
    _agree(slope, lightly["ibot_gradient"])


def test_centres_move_alike(lightly, given):
    for name, logits in (("dino", given["teacher"]), ("ibot", given["patch_teacher"])):
        moved = ssl.moved_centre(given["centre"], logits, jnp.ones(logits.shape[:-1]))
        _agree(moved, lightly[f"{name}_centre"])


def test_koleo_and_its_gradient(lightly, given):
    value, slope = jax.jit(jax.value_and_grad(ssl.koleo))(given["features"])
    _agree(value, lightly["koleo"])
    _agree(slope, lightly["koleo_gradient"])


def test_sinkhorn(lightly, given):
    ours = ssl.sinkhorn(given["logits"], MAKE["EPSILON"], jnp.ones(len(given["logits"])))
    _agree(ours, lightly["sinkhorn"])


def test_the_teachers_momentum(lightly):
    ours = [cosine(0.992, 1.0, 100)(jnp.array(step)) for step in (0, 25, 50, 100)]
    np.testing.assert_allclose(ours, lightly["momentum"], rtol=1e-6)


def test_block_masks_from_the_same_draws(lightly):
    """Every token lightly paints, and where it stops short, more at random up to the exact count."""
    plan = MaskPlan(MAKE["GRID"])
    order = np.random.default_rng(0).random(14 * 14).astype(np.float32)
    reached = 0
    for draws, painted in zip(MAKE["mask_draws"](), lightly["masks"], strict=True):
        ours = np.asarray(_paint(jnp.asarray(draws), jnp.asarray(order), jnp.array(40), plan))
        assert ours.sum() == MAKE["MASKED"] and ours[painted].all()
        reached += len(painted) == MAKE["MASKED"]
    assert reached == 5  # so they agree token by token
