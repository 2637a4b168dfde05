"""Convolutions of TransMIL and RRT: those of XLA, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathme_jax.mil.heads.square import depthwise


def convolution(image, kernel):
    return jax.lax.conv_general_dilated(
        image[None],
        kernel[:, :, None],
        (1, 1),
        "SAME",
        feature_group_count=image.shape[-1],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]


@pytest.mark.parametrize("size", [(7, 7), (5, 1), (2, 4), (9, 3)])
def test_shifted_sums_are_the_depthwise_convolution_and_its_gradient(size):
    rng = np.random.default_rng(0)
    image, kernel, g = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((6, 8, 3), (*size, 3), (6, 8, 3))
    )
    for found, expected in zip(
        jax.vjp(depthwise, image, kernel)[1](g),
        jax.vjp(convolution, image, kernel)[1](g),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    found, expected = depthwise(image, kernel), convolution(image, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
