"""DINOv2 as a whole, against METHODS 1.2: who sees what, which pairs count, what each term moves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.dinov2_tiny import get_config
from pathme_jax.errors import UserError
from pathme_jax.methods.dinov2 import DINOv2
from pathme_jax.training.contract import EmaOf, flat, resolve
from pathme_jax.training.keys import sample_keys

B, WIDTH, LOCALS = 8, 12, 2
TERMS = ("dino_global", "dino_local", "ibot", "koleo")


def _config(crops=LOCALS, **loss):
    config = get_config("test")
    config.batch.samples = B
    config.batch.window_px = 48
    config.model.update(patch=8, width=WIDTH, depth=1, heads=2, grid=4)
    config.head.update(prototypes=8, hidden=12, bottleneck=6)
    config.views.global_crop.px = 32
    config.views.local_crop.px = 16
    config.views.local_crops = crops
    config.loss.update(**loss)
    return config


def _batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "window": rng.integers(0, 256, (B, 48, 48, 3)).astype(np.uint8),
        "mpp": np.ones(B, np.float32),
    }


def _keys():
    return sample_keys(0, "views", jnp.arange(B))


@pytest.fixture(scope="module")
def world():
    method, batch = DINOv2(_config()), _batch()
    params, aux = jax.jit(lambda k: method.init(k, batch))(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    views = jax.jit(method.views)(batch, _keys())

    @jax.jit
    def run(params, views, weights):
        def weighted(params):
            total, (metrics, aux_) = method.loss(params, aux, views, _keys(), jnp.int32(0))
            value = sum(weights[name] * metrics[f"loss/{name}"] for name in TERMS)
            return value, (total, metrics, aux_)

        return jax.value_and_grad(weighted, has_aux=True)(params)

    def call(params=params, views=views, **weights):
        chosen = {name: jnp.float32(weights.get(name, 0.0)) for name in TERMS}
        (_, (total, metrics, aux_)), slope = run(params, views, chosen)
        return flat(slope), total, metrics, aux_

    return method, params, views, call


# ---- what each term moves ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("dino_global", {"student/backbone", "student/dino"}),
        ("dino_local", {"student/backbone", "student/dino"}),
        ("ibot", {"student/backbone", "student/ibot"}),
        ("koleo", {"student/backbone"}),
    ],
)
def test_the_gradient_of_a_term_reaches_the_weights_it_is_meant_for_and_no_others(
    world, term, parts
):
    slope = world[3](**{term: 1.0})[0]
    reached = {"/".join(p.split("/")[:2]) for p, g in slope.items() if np.abs(g).max() > 1e-8}
    assert reached == parts


def test_every_trained_weight_is_moved_by_some_term_and_the_teacher_by_none(world):
    method, params, _, call = world
    slope = call(**dict.fromkeys(TERMS, 1.0))[0]
    still = {p for p, g in slope.items() if np.abs(g).max() == 0}
    roles = resolve(method.roles, list(flat(params)), "role")
    assert still == {p for p, (role, _) in roles.items() if isinstance(role, EmaOf)}


# ---- the loss from METHODS, in NumPy -----------------------------------------------------------------


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


TEACHER_TEMPERATURE = get_config("test").loss.teacher_temperature


def _sinkhorn(x, temperature=TEACHER_TEMPERATURE):
    x = x / temperature
    q = np.exp(x - x.max()).T
    k, n = q.shape
    for _ in range(3):
        q = q / q.sum(1, keepdims=True) / k
        q = q / q.sum(0, keepdims=True) / n
    return (q * n).T


def _entropy(target, logits):
    return -(target * _log_softmax(logits / 0.1)).sum(-1)


def test_the_terms_are_those_of_the_recipe(world):
    """Masked student globals and unmasked locals against unmasked teacher globals; pairs (g1s, g2t),
    (g2s, g1t) and every local with both globals, over 2 + 2 n_local; iBOT 1/#masked, averaged over
    images; KoLeo per global view."""
    method, params, views, call = world
    backbone = jax.jit(lambda p, x, m=None: method.backbone.apply({"params": p["backbone"]}, x, m))

    def head(weights, name, x):
        return np.asarray(method.head.apply({"params": weights[name]}, x), np.float64)

    student, teacher = params["student"], params["teacher"]
    seen = [backbone(student, views["globals"][:, v], views["mask"][:, v]) for v in (0, 1)]
    known = [backbone(teacher, views["globals"][:, v]) for v in (0, 1)]
    near = [backbone(student, views["locals"][:, i])["cls"] for i in range(LOCALS)]
    target = np.split(
        _sinkhorn(np.concatenate([head(teacher, "dino", k["cls"]) for k in known])), 2
    )
    terms = 2 + 2 * LOCALS
    expected = {
        "dino_global": (
            _entropy(target[1], head(student, "dino", seen[0]["cls"])).mean()
            + _entropy(target[0], head(student, "dino", seen[1]["cls"])).mean()
        )
        / terms,
        "dino_local": sum(
            _entropy(t, head(student, "dino", cls)).mean() for cls in near for t in target
        )
        / terms,
        "koleo": 0.0,
        "ibot": 0.0,
    }
    at = np.argwhere(np.asarray(views["mask"]).swapaxes(0, 1))  # view, sample, token
    pick = lambda out: np.stack([np.asarray(out[v]["tokens"])[i, n] for v, i, n in at])  # noqa: E731
    goal = _sinkhorn(head(teacher, "ibot", pick(known)))
    each = _entropy(goal, head(student, "ibot", pick(seen)))
    for v in (0, 1):
        for i in range(B):
            own = (at[:, 0] == v) & (at[:, 1] == i)
            expected["ibot"] += each[own].mean() / (2 * B) if own.any() else 0.0
        x = np.asarray(seen[v]["cls"], np.float64)
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        gap = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.diag(np.full(B, np.inf))
        expected["koleo"] += -np.log(gap.min(1) + 1e-8).mean()

    _, total, metrics, _ = call()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=2e-4, err_msg=name)
    c = method.config.loss
    whole = (
        c.dino * (expected["dino_global"] + expected["dino_local"])
        + c.ibot * expected["ibot"]
        + c.koleo * expected["koleo"]
    )
    np.testing.assert_allclose(total, whole, rtol=2e-4)


def test_the_student_sees_masked_globals_and_the_teacher_whole_ones(world):
    """Content under the student's mask reaches the loss through the teacher's targets alone: with the
    targets' side held still, KoLeo of the student's CLS does not move; the teacher's entropy does."""
    _, _, views, call = world
    mask = np.asarray(views["mask"]).reshape(B, 2, 4, 4)
    hidden = np.kron(mask, np.ones((8, 8)))[..., None].astype(bool)
    changed = {**views, "globals": jnp.where(hidden, 2.0, views["globals"])}
    before, after = call()[2], call(views=changed)[2]
    np.testing.assert_allclose(after["loss/koleo"], before["loss/koleo"], rtol=1e-6)
    assert abs(float(after["teacher_entropy"] - before["teacher_entropy"])) > 1e-4


# ---- masks, crops, targets ---------------------------------------------------------------------------


def test_the_number_of_masked_tokens_is_a_constant_over_half_of_the_images(world):
    method, _, views, _ = world
    per_image = np.asarray(views["mask"]).sum(-1)
    assert per_image.sum() == method.masks.total * B // method.masks.block
    assert (per_image > 0).sum() == B
    other = jax.jit(method.views)(_batch(1), sample_keys(0, "views", jnp.arange(B) + 77))
    assert sorted(np.asarray(other["mask"]).sum(-1).ravel()) == sorted(per_image.ravel())
    assert (np.asarray(other["mask"]) != np.asarray(views["mask"])).any()


def test_every_crop_of_a_sample_is_drawn_by_itself():
    config = _config(crops=3)
    method, batch = DINOv2(config), _batch()
    views = jax.jit(method.views)(batch, _keys())
    assert views["globals"].shape == (B, 2, 32, 32, 3)
    assert views["locals"].shape == (B, 3, 16, 16, 3)
    assert np.abs(np.asarray(views["globals"][:, 0] - views["globals"][:, 1])).max() > 0.1
    assert np.abs(np.asarray(views["locals"][:, 0] - views["locals"][:, 2])).max() > 0.1
    order = np.array([1, 0, 2, 3, 4, 5, 7, 6])
    swapped = jax.jit(method.views)({k: v[order] for k, v in batch.items()}, _keys()[order])
    for name in ("globals", "locals"):
        np.testing.assert_allclose(swapped[name], np.asarray(views[name])[order], atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": "centring"},
        {"crops": 0},
        {"drop_path": 0.3},
        {"ibot_head": "shared"},
        {"koleo": 0.0, "kde": 0.05},
    ],
)
def test_every_branch_of_the_configuration_gives_a_finite_loss(change):
    method, batch = DINOv2(_config(**change)), _batch()

    @jax.jit
    def run(key, batch):
        params, aux = method.init(key, batch)
        views = method.views(batch, _keys())
        return method.loss(params, aux, views, _keys(), jnp.int32(0))

    total, (metrics, aux) = run(jax.random.key(0), batch)
    assert np.isfinite(float(total))
    assert all(np.isfinite(np.asarray(v)).all() for v in metrics.values())
    assert any(np.abs(np.asarray(c)).max() > 0 for c in aux.values())  # the centres moved


def test_a_shared_head_has_one_set_of_prototypes():
    for kind, heads in (("shared", {"dino"}), ("separate", {"dino", "ibot"})):
        method = DINOv2(_config(ibot_head=kind))
        params, _ = jax.eval_shape(lambda method=method: method.init(jax.random.key(0), {}))
        assert set(params["student"]) == heads | {"backbone"}


def test_pictures_show_crops_in_colour_with_their_masks_in_grey(world):
    method, _, views, _ = world
    rows = method.pictures(views)
    assert {k: x.shape for k, x in rows.items()} == {
        "global 1": (B, 32, 32, 3), "global 2": (B, 32, 32, 3), "local": (B, 16, 16, 3)
    }  # fmt: skip
    grey = (np.asarray(rows["global 1"]) == 0.5).all(-1)
    masked = np.asarray(views["mask"])[:, 0].sum(1) * 64  # pixels of a patch
    np.testing.assert_array_equal(grey.sum((1, 2)), masked)


def test_bfloat16_computes_the_same_loss_to_its_precision_and_keeps_fp32_weights():
    """Parameters, gradients, centres and every metric stay fp32; the loss agrees to a percent."""
    batch, found = _batch(), {}
    for dtype in ("float32", "bfloat16"):
        config = _config()
        config.model.dtype = config.head.dtype = dtype
        method = DINOv2(config)

        @jax.jit
        def run(key, batch, method=method):
            params, aux = method.init(key, batch)
            views = method.views(batch, _keys())
            loss = lambda p: method.loss(p, aux, views, _keys(), jnp.int32(0))  # noqa: E731
            return jax.value_and_grad(loss, has_aux=True)(params), params

        ((value, (metrics, aux)), slope), params = run(jax.random.key(0), batch)
        for x in jax.tree.leaves((params, slope, aux, metrics)):
            assert x.dtype == jnp.float32
        found[dtype] = float(value)
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.loss.update(targets="sinkhron"), "sinkhron"),
        (lambda c: c.loss.update(ibot_head="both"), "both"),
        (lambda c: c.batch.update(samples=12), "no multiple of"),
        (lambda c: c.views.local_crop.update(px=20), "local_crop.px = 20"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, said):
    config = _config()
    change(config)
    with pytest.raises(UserError, match=said):
        DINOv2(config)


# ---- the product -------------------------------------------------------------------------------------


def test_features_are_the_teachers_and_do_not_depend_on_the_slot(world):
    method, params, _, _ = world
    images = _batch()["window"]
    encode = jax.jit(method.encode)
    product = method.product(params)
    assert product is params["teacher"]["backbone"]
    out = np.asarray(encode(product, {"image": images}))
    assert out.shape == (B, WIDTH)
    order = np.arange(B)[::-1]
    np.testing.assert_allclose(encode(product, {"image": images[order]}), out[order], atol=1e-5)
