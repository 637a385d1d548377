"""Choose what a network is built of on the devices at hand, and XLA's compiler options on a CPU."""

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.kernels import layers, native
from resnet_jax.models import Layers


def layers_for(mesh: Mesh, model: ConfigDict) -> Layers | None:
    """Return the layers of `kernels.layers` for `config.model` in float32 on CPUs; None, Flax's, for all else."""
    return layers.for_mesh(mesh, model.activation) if _could_be_ours(mesh, model) and native.library() else None


def why_slow(mesh: Mesh, model: ConfigDict) -> str:
    """Return one line about layers that could be faster and why they are not; else an empty string."""
    reason = native.unavailable() if _could_be_ours(mesh, model) else ""
    return reason and f"using XLA's convolutions, which take about three times as long as the compiled ones: {reason}"


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return XLA's options for a mesh of CPUs, where the defaults are slower or need more memory; None elsewhere."""
    if not is_cpu(mesh):
        return None
    # One operation at a time, each on all cores. Running them concurrently is not faster and needs 50% more memory.
    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    if jax.__version_info__ < (0, 11):  # its YNNPACK runs products and convolutions in one thread
        options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_REDUCE"
    return options


def is_cpu(mesh: Mesh) -> bool:
    """Whether a mesh is of CPU devices."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def _could_be_ours(mesh: Mesh, model: ConfigDict) -> bool:
    return is_cpu(mesh) and model.dtype == "float32"
