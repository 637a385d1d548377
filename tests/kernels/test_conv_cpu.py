"""The CPU's convolutions: the values and gradients of XLA's, and the choice between the two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

from resnet_jax import kernels, models
from resnet_jax.kernels import conv_cpu


def values_and_gradients(convolve, x, w, dy, stride, padding):
    """(y, dx, dw) of a convolution."""
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y, vjp = jax.vjp(lambda x, w: convolve(x, w, (stride, stride), ((padding, padding),) * 2, **numbers), x, w)
    return y, *vjp(dy)


def random_case(batch, height, width, channels, out_channels, kernel, stride):
    """(x, w, dy), x without the negative half, as after a ReLU."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((batch, height, width, channels)), 0)
    w = rng.standard_normal((kernel, kernel, channels, out_channels)) / (kernel * np.sqrt(channels))
    dy = rng.standard_normal((batch, -(-height // stride), -(-width // stride), out_channels))
    return tuple(a.astype(np.float32) for a in (x, w, dy))


@pytest.mark.parametrize(
    "shape",  # (batch, height, width, channels, out_channels, kernel, stride)
    [
        pytest.param((6, 32, 32, 64, 64, 3, 1), id="winograd, stage 1"),
        pytest.param((10, 8, 8, 256, 256, 3, 1), id="winograd, stage 3"),
        pytest.param((7, 12, 4, 32, 48, 3, 1), id="winograd, a prime batch, not square, channels that differ"),
        pytest.param((1, 4, 4, 32, 32, 3, 1), id="winograd, one tile"),
        pytest.param((40, 16, 16, 64, 32, 3, 1), id="winograd, several chunks"),
        pytest.param((6, 32, 32, 64, 128, 3, 2), id="strided, stage 2"),
        pytest.param((5, 6, 10, 32, 16, 3, 2), id="strided, not square"),
        pytest.param((6, 32, 32, 64, 128, 1, 2), id="1x1, stride 2"),
        pytest.param((6, 7, 5, 64, 32, 1, 2), id="1x1, stride 2, odd sizes"),
        pytest.param((6, 8, 8, 64, 32, 1, 1), id="1x1, stride 1"),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(shape):
    """Against float64. The relative error (of the 2-norms) that float32 has anyway is about 4e-7 for the output and up to
    2e-6 for XLA's own weight gradient; F(4x4, 3x3) has at most about 2.5e-6, measured."""
    *_, kernel, stride = shape
    arrays = random_case(*shape)
    got = values_and_gradients(conv_cpu.conv_general_dilated, *map(jnp.array, arrays), stride, kernel // 2)
    with jax.enable_x64(True):
        exact = (jnp.array(a, jnp.float64) for a in arrays)
        want = values_and_gradients(lax.conv_general_dilated, *exact, stride, kernel // 2)
    for ours, truth in zip(got, want, strict=True):
        assert ours.shape == truth.shape
        assert ours.dtype == jnp.float32
        assert np.linalg.norm(ours - np.asarray(truth)) <= 4e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param((4, 8, 8, 64, 64, 3, 1), jnp.bfloat16, id="bfloat16"),
        pytest.param((4, 8, 8, 3, 64, 3, 1), jnp.float32, id="few channels"),
        pytest.param((4, 6, 6, 64, 64, 3, 1), jnp.float32, id="sizes that tiles of 4 do not divide"),
        pytest.param((4, 7, 7, 64, 64, 3, 2), jnp.float32, id="odd sizes"),
    ],
)
def test_all_else_is_xlas_convolution(shape, dtype):
    *_, kernel, stride = shape
    arrays = [jnp.array(a, dtype) for a in random_case(*shape)]
    got = values_and_gradients(conv_cpu.conv_general_dilated, *arrays, stride, kernel // 2)
    want = values_and_gradients(lax.conv_general_dilated, *arrays, stride, kernel // 2)
    for ours, xlas in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, xlas)


def test_one_cpu_device_uses_them_and_others_do_not():
    class Device:
        platform = "gpu"

    one_cpu = Mesh(np.array(jax.devices("cpu")[:1]), ("data",))
    assert kernels.for_training(one_cpu) is conv_cpu.conv_general_dilated
    for devices in ([Device()], [Device(), Device()], jax.devices("cpu")[:2]):
        mesh = type("FakeMesh", (), {"size": len(devices), "devices": np.array(devices)})()
        assert kernels.for_training(mesh) is kernels.for_inference(mesh) is lax.conv_general_dilated


@pytest.mark.parametrize(("images", "uses_them"), [(1, False), (31, False), (32, True), (128, True)])
def test_in_use_few_images_go_through_xlas_own(monkeypatch, images, uses_them):
    calls = []
    monkeypatch.setattr(conv_cpu, "conv_general_dilated", lambda *_: calls.append("ours"))
    monkeypatch.setattr(lax, "conv_general_dilated", lambda *_: calls.append("xla"))
    one_cpu = Mesh(np.array(jax.devices("cpu")[:1]), ("data",))
    kernels.for_inference(one_cpu)(np.zeros((images, 4, 4, 3)), None)
    assert calls == (["ours"] if uses_them else ["xla"])


def test_the_whole_models_gradient_equals_that_of_the_plain_convolutions():
    """A block of every kind of convolution. Beyond one convolution's rounding, a ReLU whose input is near 0 may flip."""
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    labels = jnp.arange(8) % 10
    plain = models.ResNet(10, (32, 64), (1, 1))
    variables = plain.init(jax.random.key(1), x, train=False)

    def loss(params, model):
        logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(8), labels])

    ours = plain.copy(conv_general_dilated=conv_cpu.conv_general_dilated)
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (plain_loss, plain_gradient), (our_loss, our_gradient) = (
        value_and_grad(variables["params"], model) for model in (plain, ours)
    )
    np.testing.assert_allclose(our_loss, plain_loss, rtol=1e-5)
    norms = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)), plain_gradient, our_gradient)
    assert max(jax.tree.leaves(norms)) < 2e-3
    assert min(jax.tree.leaves(norms)) < 1e-5
