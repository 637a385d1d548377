"""The whitened first layer: what its filters do to patches, and that training leaves it as it is."""

import numpy as np
import pytest
from jax import lax

from configs import final
from resnet_jax import training
from resnet_jax.data import whitening
from resnet_jax.inference import trained_model
from resnet_jax.setup import setup


@pytest.fixture
def data():
    return final.get_config().data


def smooth_images(count, size=12):
    """Noise that neighbouring pixels and channels share, as in pictures."""
    noise = np.random.default_rng(0).normal(size=(count, size + 4, size + 4, 3))
    for axis in (1, 2):
        noise = sum(np.roll(noise, shift, axis) for shift in range(3))
    noise = noise + noise.mean(axis=3, keepdims=True)
    return np.clip(128 + 15 * noise[:, 4:, 4:], 0, 255).astype(np.uint8)


def outputs(images, kernel, data):
    """The filters' outputs on the patches inside the images: float64 [patches, count]."""
    x = (images / 255 - np.array(data.mean)) / np.array(data.std)
    y = lax.conv_general_dilated(
        x.astype(np.float32), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(y, np.float64).reshape(-1, kernel.shape[-1])


def test_the_filters_whiten_patches_and_come_with_their_negatives(data):
    images = smooth_images(1200)
    kernel = whitening.filters(images, data, 54)
    assert (kernel.shape, kernel.dtype) == ((3, 3, 3, 54), np.float32)
    np.testing.assert_array_equal(kernel[..., 27:], -kernel[..., :27])
    y = outputs(images, kernel[..., :27], data)
    second_moments = y.T @ y / len(y)
    variances = np.diag(second_moments)
    np.testing.assert_allclose(second_moments - np.diag(variances), 0, atol=1e-3)
    # A direction of variance v has v / (v + epsilon) afterwards, where v is 1 over the squared norm of the filter, less epsilon.
    v = 1 / (kernel[..., :27].astype(np.float64) ** 2).sum((0, 1, 2)) - 5e-4
    np.testing.assert_allclose(variances, v / (v + 5e-4), rtol=1e-3)
    assert (np.diff(v) < 0).all()  # the largest first


def test_fewer_filters_are_the_first_ones(data):
    images = smooth_images(300)
    few, all_of_them = (whitening.filters(images, data, count) for count in (8, 54))
    np.testing.assert_array_equal(few[..., :4], all_of_them[..., :4])
    np.testing.assert_array_equal(few[..., 4:], -few[..., :4])


def test_a_sample_of_many_images_is_read_at_equal_distances(data):
    """A folder's images are sorted by class, so the first of them would not do."""
    images = np.concatenate([smooth_images(5000, 4), 255 - smooth_images(5001, 4) // 2])
    np.testing.assert_array_equal(whitening.filters(images, data, 8), whitening.filters(images[::3], data, 8))


def test_a_run_keeps_the_filters_of_its_training_images(tmp_path, tiny_config):
    tiny_config.model.stem = "whitened"
    start = setup(tiny_config)
    kernel = whitening.filters(start.train.images, start.config.data, tiny_config.model.channel_list[0])
    np.testing.assert_array_equal(start.state.params["stem_conv"]["kernel"], kernel)
    training.train(tiny_config, tmp_path)
    trained = trained_model.load(tmp_path).variables["params"]
    np.testing.assert_array_equal(trained["stem_conv"]["kernel"], kernel)
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(trained["stem_norm"][name], start.state.params["stem_norm"][name])
    assert not np.array_equal(
        trained["stage1_block1"]["norm1"]["bias"], start.state.params["stage1_block1"]["norm1"]["bias"]
    )
