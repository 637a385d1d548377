"""The state of a run, how it is created, and its digest."""

import hashlib
import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics, parameter_overview  # only here: it is no longer maintained
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from resnet_jax import kernels, models, optim
from resnet_jax.errors import UserError


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
    """Means over the steps since the last row of `metrics.jsonl`."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    accuracy: metrics.Average.from_output("accuracy")  # type: ignore[valid-type]
    grad_norm: metrics.Average.from_output("grad_norm")  # type: ignore[valid-type]


class TrainState(flax.struct.PyTreeNode):
    """The content of a checkpoint, with the model's `apply` and the optimizer.

    Attributes:
        step: int32 [], number of steps done.
        params: the model's parameters.
        batch_stats: batch norm's running statistics, float32.
        opt_state: the optimizer's state.
        metrics: means since the last logged step; stored here so that a resumed run logs the same rows.
        failed: bool [], whether a step was rejected because of its loss or gradient; all later steps are rejected too.
        apply_fn: the model's `apply`; not saved.
        tx: the optimizer; not saved.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    metrics: TrainMetrics
    failed: jax.Array
    apply_fn: Any = flax.struct.field(pytree_node=False)
    tx: optax.GradientTransformation = flax.struct.field(pytree_node=False)

    @property
    def variables(self) -> Any:
        """The weights that are evaluated and exported: {"params", "batch_stats"}."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_variables(self, variables: Any) -> "TrainState":
        """The state with other weights, from which training starts."""
        return self.replace(**variables)

    def with_stem(self, kernel: jax.Array) -> "TrainState":
        """The state with another kernel of the first layer."""
        params = self.params | {"stem_conv": {"kernel": kernel}}
        return self.with_variables({"params": params, "batch_stats": self.batch_stats})


class AveragedTrainState(TrainState):
    """A state with the moving average of its weights and of batch norm's running statistics, as {"params", "batch_stats"}."""

    average: Any

    @property
    def variables(self) -> Any:
        """The average."""
        return self.average

    def with_variables(self, variables: Any) -> "AveragedTrainState":
        """The state with other weights; the average starts from them too."""
        return self.replace(**variables, average=jax.tree.map(jnp.copy, variables))  # else a step donates arrays twice

    def averaged(self, decay: float) -> "AveragedTrainState":
        """The state after step t with its weights taken into the average.

        The decay is at most (1 + t) / (10 + t), so that step 0 fades soon, as in TensorFlow's `ExponentialMovingAverage`.
        """
        new = 1.0 - jnp.minimum(decay, (1.0 + self.step) / (10.0 + self.step))
        average = jax.tree.map(lambda a, x: (a + new * (x - a)).astype(a.dtype), self.average, super().variables)
        return self.replace(average=average)


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Return a mesh of the first `num_devices` devices, or of all, on one axis, "data", process after process.

    Raises:
        UserError: if JAX finds no device, or fewer than `num_devices`.
    """
    try:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))  # as batches are sliced
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"JAX finds no device ({error or 'none of that kind'}): install its plugin, or unset JAX_PLATFORMS"
        ) from error
    if num_devices is not None and num_devices > len(devices):
        raise UserError(f"{num_devices} devices are needed, but JAX finds {len(devices)}: use at most {len(devices)}")
    return Mesh(np.array(devices[:num_devices]), ("data",))


def create(
    config: ConfigDict, num_classes: int, image_shape: tuple[int, ...], steps_per_epoch: float, mesh: Mesh
) -> TrainState:
    """Create the state of step 0, replicated on the mesh.

    Parameters are drawn from `jax.random.key(config.seed)`. Lazy initialisation runs only the initialisers; on a CPU,
    compiling a whole forward pass takes four times as long.

    Args:
        config: the whole config.
        num_classes: size of the output.
        image_shape: (H, W, C) of an image.
        steps_per_epoch: for the learning-rate schedule.
        mesh: the devices.
    """
    model = models.from_config(config.model, num_classes, kernels.layers_for(mesh, config.model))
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = model.lazy_init(jax.random.key(config.seed), image, train=False)
    tx = optim.make_optimizer(config, optim.make_schedule(config, steps_per_epoch))
    zero = jnp.zeros(())
    average = {"average": dict(variables)} if config.optim.ema_decay else {}
    state = (AveragedTrainState if average else TrainState)(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        metrics=TrainMetrics.single_from_model_output(loss=zero, accuracy=zero, grad_norm=zero),
        failed=jnp.zeros((), jnp.bool_),
        apply_fn=model.apply,
        tx=tx,
        **average,
    )
    return jax.device_put(state, NamedSharding(mesh, P()))


parameter_table = partial(parameter_overview.get_parameter_overview, include_stats=False)


def num_params(params: Any) -> int:
    """Count trainable parameters, given arrays or their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def trained(state: TrainState) -> dict[str, Any]:
    """Return the part of a state that `state_digest` in `result.json` covers: no step, metrics or flag."""
    average = {"average": state.average} if isinstance(state, AveragedTrainState) else {}
    return {"params": state.params, "batch_stats": state.batch_stats, "opt_state": state.opt_state} | average


def digest(tree: Any) -> str:
    """Return the SHA-256 of a tree of arrays, in hexadecimal.

    For each leaf, sorted by path as text, it covers the line "path dtype shape" and the leaf's bytes in C order.
    """
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    sha = hashlib.sha256()
    for path, leaf in sorted(leaves.items()):
        array = np.asarray(leaf, order="C")
        sha.update(f"{path} {array.dtype} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
