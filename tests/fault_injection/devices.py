"""Train on 1, 2, 4 and 8 of eight fake devices, and print the largest relative differences from one device as JSON.

The caller asks XLA for the eight devices.

The batches are those of the device pipeline: gathered and augmented on the devices.

Losses and batch statistics are compared in float32, after one step and after ten; parameters in float64, for in float32
rounding flips what is discrete: the sign of a gradient near 0, which is Adam's first update, or a ReLU near 0.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from configs import final, sgd
from resnet_jax import steps, train_state
from resnet_jax.data import augment_jax, feed, pipelines
from resnet_jax.data.datasets import Split

STEPS = 10


def train(optimizer: str, dtype: str, devices: int) -> dict[str, Any]:
    """What is compared, of a run of ten steps."""
    config = final.get_config("smoke")
    config.log_every_steps, config.batch_size = 1, 32
    config.model.dtype = dtype
    if optimizer == "sgd":
        config.optim, config.schedule = sgd.get_config().optim, sgd.get_config().schedule
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    state = train_state.create(config, 10, (8, 8, 3), 10.0, mesh)
    step = steps.jit_train_steps(config, mesh, partial(augment_jax.build_batch, config=config.augment))
    found: dict[str, Any] = {"losses": []}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (STEPS, 32, 8, 8, 3)) // np.repeat([1, 2, 4, 8], 8)[:, None, None, None]
    split = Split(images.reshape(-1, 8, 8, 3).astype(np.uint8), rng.integers(0, 10, STEPS * 32, np.int32))
    data = feed.put(split._asdict(), mesh, P())
    for number in range(STEPS):
        draws = pipelines.train_draws(split, config, number, 1)
        in_order = np.arange(number * 32, (number + 1) * 32, dtype=np.int32)  # so that devices' means differ
        draws["indices"] = in_order[None]
        state, metrics = step(state, data, feed.put(draws, mesh, P(None, "data")))
        found["losses"].append(float(jax.tree.map(lambda values: values[0], metrics.means).compute()["loss"]))
        if number == 0:
            found["batch_stats after one step"] = jax.device_get(state.batch_stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(dtype)}
    return found | {"batch_stats": jax.device_get(state.batch_stats), "params": jax.device_get(state.params)}


def difference(one: object, other: object) -> float:
    """The largest difference of any number, relative to the largest of its array."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)  # a loss is an array of one number here
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / (np.abs(np.asarray(a)).max() + 1e-30)) for a, b in pairs
    )


def main() -> None:
    """Compare."""
    found: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "float64"):
        jax.config.update("jax_enable_x64", dtype == "float64")
        for optimizer in ("adamw", "sgd"):
            alone = train(optimizer, dtype, 1)
            for devices in (2, 4, 8):
                shared = train(optimizer, dtype, devices)
                row = found.setdefault(str(devices), {})
                row |= {f"{dtype} {optimizer} {name}": difference(alone[name], shared[name]) for name in alone}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
