"""Measure the train step and the streaming pipeline: `python -m resnet_jax.benchmark --config configs/final.py`.

Each is warmed up, which leaves compilation out, and timed over several repeats, interleaved; the table gives the median
and the spread. The step is fed one batch that lies on the device; the pipeline is drained with nothing else running.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from resnet_jax import cli
from resnet_jax import config as config_lib
from resnet_jax.errors import UserError

flags.declare_key_flag("config")  # so that --help shows it
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 5.0, "Of each measurement, at least.", lower_bound=0.0)
OUTPUT = flags.DEFINE_string("output", None, "Write the result to this JSON file.")


def time_repeats(work: dict[str, Callable[[], int]], repeats: int, min_seconds: float) -> dict[str, list[float]]:
    """Time pieces of work side by side.

    Args:
        work: by name, a function that does a unit of the work, to its end, and returns how many images that was.
        repeats: how often each is measured, A B A B.
        min_seconds: how long a measurement goes on at least.

    Returns:
        By name, images/s of each repeat.
    """
    rates: dict[str, list[float]] = {name: [] for name in work}
    for unit in work.values():
        unit()
    for _ in range(repeats):
        for name, unit in work.items():
            images, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < min_seconds or not images:
                images += unit()
            rates[name].append(images / elapsed)
    return rates


def measure(config: ConfigDict, repeats: int, min_seconds: float) -> dict[str, Any]:
    """Measure a config on this machine; a result for `results/`."""
    import jax

    from resnet_jax import input_pipeline, setup, steps, workdir

    run = setup.setup(config)
    train_step = steps.jit_train_step(config, run.mesh)
    stream = input_pipeline.train_batches(run.train, config, 0, 10**9)
    batch = steps.shard_batch(next(stream), run.mesh)
    state = run.state

    def one_step() -> int:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        return config.batch_size

    def some_batches() -> int:
        return sum(len(batch["labels"]) for batch in itertools.islice(stream, 20))

    rates = time_repeats({"train_step": one_step, "tf_data_pipeline": some_batches}, repeats, min_seconds)
    return {
        "images_per_second": {
            name: {"median": statistics.median(r), "min": min(r), "max": max(r), "repeats": r}
            for name, r in rates.items()
        },
        "config": config_lib.to_json(config),
        "environment": workdir.environment(),
    }


def main(config: ConfigDict) -> None:
    """Measure, print a table and write the result."""
    output = Path(OUTPUT.value).absolute() if OUTPUT.value else None
    if output and (output.is_dir() or not os.access(output.parent, os.W_OK)):
        raise UserError(f"--output {output}: give a file in a folder that can be written")
    from resnet_jax import workdir

    result = measure(config, REPEATS.value, SECONDS.value)
    print(f"{'images/s':<18} {'median':>9} {'min':>9} {'max':>9}   batch {config.batch_size}, {REPEATS.value} repeats")
    for name, rate in result["images_per_second"].items():
        print(f"{name:<18} {rate['median']:>9.1f} {rate['min']:>9.1f} {rate['max']:>9.1f}")
    if output:
        workdir.write_json(output, result)
        print(output)


if __name__ == "__main__":
    cli.run(main)
