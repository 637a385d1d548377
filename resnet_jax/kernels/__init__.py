"""Choose the convolution of a network, XLA's or the faster ones of `conv_cpu`, and XLA's compiler options on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh

from resnet_jax.kernels import conv_cpu

Convolution = Callable[..., jax.Array]  # `jax.lax.conv_general_dilated` or an equivalent function

_MANY = 32  # images; from this batch size, `conv_cpu` has the faster forward pass


def for_training(mesh: Mesh) -> Convolution:
    """Return the convolution for training on a mesh: `conv_cpu`'s on a single CPU device, otherwise XLA's.

    On several devices, XLA would gather the images of every chunk from all of them.
    """
    return conv_cpu.conv_general_dilated if _is_one_cpu(mesh) else lax.conv_general_dilated


def for_inference(mesh: Mesh) -> Convolution:
    """Return the convolution for inference: as in training, but XLA's for small batches, where it is faster."""
    if not _is_one_cpu(mesh):
        return lax.conv_general_dilated

    def convolution(x: jax.Array, *arguments: Any, **settings: Any) -> jax.Array:
        chosen = lax.conv_general_dilated if len(x) < _MANY else conv_cpu.conv_general_dilated
        return chosen(x, *arguments, **settings)

    return convolution


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return XLA's options for a mesh of CPUs, where the defaults are slower or need more memory; None elsewhere."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    # One operation at a time, each on all cores. Running them concurrently is not faster and needs 50% more memory.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.__version_info__ < (0, 11):  # its YNNPACK runs products and convolutions in one thread
        options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
    return options


def _is_one_cpu(mesh: Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.item().platform == "cpu"
