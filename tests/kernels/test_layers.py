"""A network of the compiled layers is the network of Flax's layers; and which of the two a run has."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import kernels, models, train_state
from resnet_jax.kernels import layers, native

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=f"the compiled functions: {native.unavailable()}")

NETWORKS = {
    "basic": {"channel_list": (16, 32), "block_list": (2, 1)},
    "bottleneck": {"channel_list": (16, 32), "block_list": (1, 1), "block": models.BottleneckBlock},
    "a stem for large images": {"channel_list": (16, 32), "block_list": (1, 1), "stem": "imagenet"},
    "max-pools": {"channel_list": (16, 32), "block_list": (0, 1), "downsample": "pool", "global_pool": "max"},
    "gelu": {"channel_list": (16, 16, 32), "block_list": (0, 2, 1), "downsample": "pool", "activation": "gelu"},
    "max-pools first": {
        "channel_list": (16, 16, 32),
        "block_list": (0, 1, 1),
        "downsample": "pool_first",
        "activation": "gelu",
        "global_pool": "max",
    },
    "max-pools first, channels that vectors do not divide": {
        "channel_list": (12, 20),
        "block_list": (0, 0),
        "downsample": "pool_first",
    },
    "gelu, channels that vectors do not divide": {"channel_list": (12, 20), "block_list": (1, 1), "activation": "gelu"},
    "no block": {"channel_list": (16,), "block_list": (0,)},
    "channels that vectors do not divide": {"channel_list": (12, 20), "block_list": (1, 1)},
}


def pair(**settings):
    """The network of Flax's layers and that of ours."""
    plain = models.ResNet(10, **settings)
    return plain, plain.copy(layers=layers.for_mesh(train_state.make_mesh(1), plain.activation))


def variables_of(network, size=16):
    """Its variables, with batch norm's as after some training."""
    variables = network.lazy_init(jax.random.key(1), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), train=False)
    rng = np.random.default_rng(0)
    return {
        "params": jax.tree.map(
            lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), variables["params"]
        ),
        "batch_stats": jax.tree.map(lambda a: a + rng.random(a.shape).astype(np.float32), variables["batch_stats"]),
    }


@needs_native
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_the_initial_parameters_are_those_of_flaxs_layers(settings):
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    plain, ours = (network.lazy_init(jax.random.key(1), image, train=False) for network in pair(**settings))
    assert train_state.digest(ours) == train_state.digest(plain)


@needs_native
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_logits_statistics_and_gradients_are_those_of_flaxs_layers_in_float64(settings, train):
    """Flax's own layers in float32 come within 1.2e-6. Winograd's transforms round more: ours come within 9.2e-6."""
    assert largest_error(settings, train, (8, 16, 16, 3)) <= 2e-5


@needs_native
@pytest.mark.parametrize("count", [1, 8], ids=["without Winograd", "with it"])
@pytest.mark.parametrize("downsample", ["stride", "pool", "pool_first"])
@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_images_whose_half_is_odd(count, downsample, train):
    settings = {"channel_list": (16, 16, 32), "block_list": (1, 1, 0), "downsample": downsample, "activation": "gelu"}
    assert largest_error(settings, train, (count, 10, 10, 3)) <= 2e-5


def largest_error(settings, train, shape):
    """The largest relative error, over all arrays, of a network's logits, statistics and gradients."""
    plain, ours = pair(**settings)
    variables = variables_of(plain)
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    rows = jnp.arange(len(x))

    def loss(params, batch_stats, x, network):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = network.apply(variables, x, train=train, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[rows, rows]), (logits, updates)

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)
    arguments = (variables["params"], variables["batch_stats"], x)
    got = gradient(*arguments, ours)
    with jax.enable_x64(True):
        exact = plain.copy(dtype=jnp.float64)
        truth = gradient(*jax.tree.map(lambda a: jnp.array(a, jnp.float64), arguments), exact)
    norms = jax.tree.map(lambda a, b: np.linalg.norm(a - np.asarray(b)) / np.linalg.norm(b), got, truth)
    return max(jax.tree.leaves(norms))


def test_float32_on_cpus_has_ours_and_all_else_flaxs(final_config, monkeypatch):
    config = final_config.model
    cpus = train_state.make_mesh(2)
    gpu = type("FakeMesh", (), {"devices": np.array([type("Device", (), {"platform": "gpu"})()])})()
    bfloat16 = config.copy_and_resolve_references()
    bfloat16.dtype = "bfloat16"
    for mesh, model in ((gpu, config), (cpus, bfloat16)):
        assert kernels.layers_for(mesh, model) is None
        assert kernels.why_slow(mesh, model) == ""
    assert bool(kernels.layers_for(cpus, config)) == (not native.unavailable())
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler")
    assert kernels.why_slow(cpus, config).endswith(": no compiler")


def test_why_the_compiled_functions_are_not_used_is_told(monkeypatch, tmp_path):
    def told():
        native.unavailable.cache_clear()
        return native.unavailable()

    monkeypatch.delenv("RESNET_JAX_NATIVE", raising=False)
    try:
        monkeypatch.setattr(native, "_LIBRARY", tmp_path / "missing.so")
        assert told() == "they were not compiled: install a C++ compiler, then resnet_jax again"
        (tmp_path / "broken.so").write_bytes(b"as of another system")
        monkeypatch.setattr(native, "_LIBRARY", tmp_path / "broken.so")
        assert re.fullmatch(r"they cannot be loaded \(.*broken\.so.*\): install resnet_jax again", told())
        monkeypatch.setenv("RESNET_JAX_NATIVE", "0")
        assert told() == "RESNET_JAX_NATIVE is 0"
    finally:
        monkeypatch.undo()
        native.unavailable.cache_clear()


@needs_native
def test_functions_compiled_from_other_sources_are_not_used(monkeypatch, tmp_path):
    for name in native.SOURCES:
        (tmp_path / name).write_text("changed")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.unavailable.cache_clear()
    try:
        assert native.unavailable() == "they were compiled from other sources: install resnet_jax again"
    finally:
        native.unavailable.cache_clear()


@needs_native
def test_functions_compiled_for_a_later_jax_are_not_used(monkeypatch, tmp_path):
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MINOR 0\n")
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    native.unavailable.cache_clear()
    try:
        assert native.unavailable() == "they were compiled for a later version of JAX: install resnet_jax again"
    finally:
        native.unavailable.cache_clear()
