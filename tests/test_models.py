import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import best, resnet50
from resnet_jax import config as config_lib
from resnet_jax import models

CHANNELS = (64, 128, 256, 512)


def shapes(model, size=32):
    image = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, train=True), image)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (models.ResNet(10, CHANNELS, (3, 5, 3, 0)), 4_918_602),
        (models.ResNet(10, CHANNELS, (2, 2, 2, 2)), 11_173_962),
        # He et al.'s networks on ImageNet, as torchvision counts them:
        (models.ResNet(1000, CHANNELS, (2, 2, 2, 2), stem="imagenet"), 11_689_512),
        (models.ResNet(1000, CHANNELS, (3, 4, 6, 3), stem="imagenet"), 21_797_672),
        (models.ResNet(1000, CHANNELS, (3, 4, 6, 3), models.BottleneckBlock, "imagenet"), 25_557_032),
        (models.ResNet(1000, CHANNELS, (3, 4, 23, 3), models.BottleneckBlock, "imagenet"), 44_549_160),
    ],
    ids=["final", "resnet18", "resnet18-imagenet", "resnet34", "resnet50", "resnet101"],
)
def test_parameters_are_counted_exactly(model, size):
    logits, variables = shapes(model)
    assert logits.shape == (2, model.num_classes)
    assert count(variables) == size


def test_resnet50_has_a_config():
    config = config_lib.replaced(resnet50.get_config(), {"model.dtype": "float32"})
    resnet50_of_imagenet = models.ResNet(1000, CHANNELS, (3, 4, 6, 3), models.BottleneckBlock, "imagenet")
    assert models.from_config(config.model, 1000) == resnet50_of_imagenet


def test_config_builds_the_preset(final_config):
    assert models.from_config(final_config.model, 10) == models.ResNet(10, CHANNELS, (3, 5, 3, 0))


def test_the_best_config_has_fewer_than_5_million_parameters():
    config = best.get_config().model
    config.dtype = "float32"
    _, variables = shapes(models.from_config(config, 10))
    assert count(variables) == 4_894_282


def test_a_stage_without_blocks_is_the_identity():
    _, with_stage = shapes(models.ResNet(10, (8, 16, 32), (1, 1, 0)))
    _, without = shapes(models.ResNet(10, (8, 16), (1, 1)))
    assert with_stage == without


def test_the_cifar_stem_keeps_the_resolution_and_the_imagenet_stem_quarters_it():
    def stage_shape(stem):
        model = models.ResNet(10, (8,), (1,), stem=stem)
        x = jnp.zeros((1, 32, 32, 3))
        _, state = jax.eval_shape(
            lambda x: model.init_with_output(
                jax.random.key(0), x, train=False, capture_intermediates=True, mutable=True
            ),
            x,
        )
        return state["intermediates"]["stage1_block1"]["__call__"][0].shape

    assert stage_shape("cifar") == (1, 32, 32, 8)
    assert stage_shape("imagenet") == (1, 8, 8, 8)


@pytest.mark.parametrize("block", [models.BasicBlock, models.BottleneckBlock])
def test_computation_in_bfloat16_keeps_parameters_and_statistics_in_float32(block):
    model = models.ResNet(10, (8, 16), (1, 1), block, dtype=jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    variables = model.init(jax.random.key(0), x, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits = model.apply(variables, x, train=False)
    assert logits.dtype == jnp.float32
    exact = model.clone(dtype=jnp.float32).apply(variables, x, train=False)
    assert not np.array_equal(logits, exact)
    np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())  # bfloat16 keeps 8 bits


def test_batch_norm_follows_its_momentum_and_epsilon():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(8, 4, 4, 3)).astype(np.float32)
    model = models.ResNet(2, (4,), (0,), batch_norm_momentum=0.75, batch_norm_epsilon=0.5)
    variables = model.init(jax.random.key(0), x, train=False)
    features = jax.lax.conv_general_dilated(
        x,
        variables["params"]["stem_conv"]["kernel"],
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    mean, var = np.mean(features, axis=(0, 1, 2)), np.var(features, axis=(0, 1, 2))
    logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["stem_norm"]["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(updates["batch_stats"]["stem_norm"]["var"], 0.75 + 0.25 * var, rtol=1e-5)
    normalised = np.maximum((features - mean.reshape(1, 1, 1, 4)) / np.sqrt(var + 0.5).reshape(1, 1, 1, 4), 0)
    head = variables["params"]["classifier"]
    expected = normalised.mean(axis=(1, 2)) @ head["kernel"] + np.reshape(head["bias"], (1, 2))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_block_with_a_stride_has_a_shortcut_convolution_even_if_it_changes_no_shape():
    _, variables = shapes(models.ResNet(10, (8, 8, 8), (1, 1, 1)), size=2)  # 2 x 2 pixels, 1 x 1, and 1 x 1
    has_one = ["shortcut_conv" in variables["params"][f"stage{i}_block1"] for i in (1, 2, 3)]
    assert has_one == [False, True, True]


def test_a_max_pool_takes_each_stages_first_half():
    model = models.ResNet(10, (8, 12, 16), (0, 1, 0), downsample="pool", global_pool="max", logit_scale=0.5)
    logits, variables = shapes(model)
    assert logits.shape == (2, 10)
    params = variables["params"]
    assert set(params) == {
        *("stem_conv", "stem_norm", "stage2_conv", "stage2_norm", "stage2_block1", "stage3_conv", "stage3_norm"),
        "classifier",
    }
    assert set(params["stage2_block1"]) == {"conv1", "conv2", "norm1", "norm2"}  # the identity is its shortcut
    assert params["stage3_conv"]["kernel"].shape == (3, 3, 12, 16)


def test_the_classifier_reads_the_maximum_of_each_channel_and_the_logits_are_scaled():
    mean, largest, scaled = (
        models.ResNet(10, (8,), (0,), **settings) for settings in ({}, {"global_pool": "max"}, {"logit_scale": 0.125})
    )
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    variables = mean.init(jax.random.key(0), x, train=False)
    plain, taken = mean.apply(
        variables,
        x,
        train=False,
        capture_intermediates=lambda module, _: module.name == "stem_norm",
        mutable=["intermediates"],
    )
    pixels = np.maximum(taken["intermediates"]["stem_norm"]["__call__"][0], 0)
    classifier = variables["params"]["classifier"]
    expected = pixels.max(axis=(1, 2)) @ classifier["kernel"] + classifier["bias"][None]
    np.testing.assert_allclose(largest.apply(variables, x, train=False), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.apply(variables, x, train=False), 0.125 * plain, rtol=1e-6)


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_max_pool_takes_the_maximum_of_each_square(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(models.max_pool(x), expected)
