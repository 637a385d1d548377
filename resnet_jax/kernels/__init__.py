"""Faster convolutions on a CPU, the one place that chooses between them and XLA's own, and XLA's settings there."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from resnet_jax.kernels import conv_cpu

Convolution = Callable[..., jax.Array]  # `jax.lax.conv_general_dilated`, or a function that equals it

_MANY = 32  # images, from which on `conv_cpu` is faster than XLA in a forward pass


def for_training(mesh: Mesh) -> Convolution:
    """The convolution of a network that is trained on a mesh: `conv_cpu` on a single CPU device, else XLA's.

    On several devices XLA would gather every chunk's images from all of them.
    """
    return conv_cpu.conv_general_dilated if _is_one_cpu(mesh) else lax.conv_general_dilated


def for_inference(mesh: Mesh) -> Convolution:
    """The convolution of a network in use: as in training, but XLA's for a few images, which it convolves faster."""
    if not _is_one_cpu(mesh):
        return lax.conv_general_dilated

    def convolution(x: jax.Array, *arguments: Any, **settings: Any) -> jax.Array:
        chosen = lax.conv_general_dilated if len(x) < _MANY else conv_cpu.conv_general_dilated
        return chosen(x, *arguments, **settings)

    return convolution


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Settings of XLA for a mesh of CPUs, where its defaults are slower or need more memory; None elsewhere."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    # Operations one after another, each on all cores; side by side they are no faster and take half as much memory again.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.__version_info__ < (0, 11):  # whose YNNPACK computes products and convolutions in a single thread
        options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
    return options


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.item().platform == "cpu"
