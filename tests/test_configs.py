"""Every config stands: its method can be built, and its rules cover every parameter."""

from __future__ import annotations

import jax
import pytest

from configs import dinov2
from pathme_jax.data import pipeline
from pathme_jax.encoders import patch
from pathme_jax.encoders.zoo import ENCODERS
from pathme_jax.training.contract import load_method
from pathme_jax.training.sharding import make_mesh
from pathme_jax.training.step import make_plan


@pytest.mark.parametrize(
    ("variant", "millions", "heads"),
    [("S/16", 22, 22), ("B/16", 86, 23), ("L/16", 303, 24), ("H/14", 631, 25), ("g/14", 1135, 117)],
)
def test_the_published_recipe_at_every_size(variant, millions, heads):
    """Parameters of the encoder and of its heads, in millions; nothing is allocated."""
    config = dinov2.get_config(variant)
    method = load_method(config)
    batch = pipeline.shapes(None, method.batch_spec)
    plan = make_plan(method, config, batch, make_mesh({"data": -1}))
    size = {"backbone": 0, "heads": 0}
    for path, x in plan.state["trained"].items():
        size["backbone" if path.startswith("student/backbone") else "heads"] += x.size / 1e6
    assert size["backbone"] == pytest.approx(millions, abs=1)
    assert size["heads"] == pytest.approx(heads, abs=1)
    assert set(plan.follows.values()) == set(plan.state["trained"])
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2048))
    views = jax.eval_shape(method.views, batch, keys)
    side = 224 // config.model.patch
    assert views["globals"].shape == (2048, 2, 224, 224, 3) and views["locals"].shape[:2] == (
        2048,
        8,
    )
    assert views["mask"].shape == (2048, 2, side * side)


@pytest.mark.parametrize("name", ["uni", "virchow2", "h-optimus-0", "kaiko-s8", "conch-v1.5"])
def test_it_goes_on_from_a_public_encoder(name):
    """The model to train is the converted one's, parameter by parameter."""
    config = dinov2.get_config(name)
    method = load_method(config)
    batch = pipeline.shapes(None, method.batch_spec)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), batch)
    expected = patch.abstract(ENCODERS[name])["backbone"]
    shapes = jax.tree.map(lambda x: x.shape, params["student"]["backbone"])
    assert shapes == jax.tree.map(lambda x: x.shape, expected)
    assert method.definition().input == ENCODERS[name].input


@pytest.mark.parametrize("variant", ["XL/16", "L", "L/15", ""])
def test_an_unknown_variant_is_refused(variant):
    with pytest.raises(ValueError, match="expected one of S B L H g"):
        dinov2.get_config(variant)
