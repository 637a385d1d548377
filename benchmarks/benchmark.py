"""Measure a config on this machine: `python -m benchmarks.benchmark --config configs/final.py --output result.json`.

For each batch size, dtype and number of devices it measures, or with `--only` a part of:

    train_step, eval_step   the bare step, fed one batch that lies on the devices; GFLOP an image as XLA counts them
    pipeline                the training stream, drained with nothing else running
    end_to_end              the loop of launch.py, from its first step's end to its last's; and its ratio to train_step
    startup                 launch.py from command to first step's dispatch, compilation cache cold and warm
    save                    how long a checkpoint blocks the loop
    memory                  peak of launch.py: resident on the host and, where the backend says so, on the device

Throughputs are warmed up, which leaves compilation out, and interleaved A B A B; ratios are taken round by round. The
table gives the median and the spread; the JSON all repeats, the config and the environment.
"""

import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import timing
from resnet_jax import cli
from resnet_jax import config as config_lib
from resnet_jax.errors import UserError

THROUGHPUTS = ("train_step", "eval_step", "pipeline", "end_to_end")
MEASUREMENTS = (*THROUGHPUTS, "startup", "save", "memory")
RATIOS = (("end_to_end", "train_step"), ("train_step", "torch_train_step"))

flags.declare_key_flag("config")  # so that --help shows it
ONLY = flags.DEFINE_list("only", list(MEASUREMENTS), "What to measure.")
BATCH_SIZES = flags.DEFINE_list("batch-sizes", [], "Instead of config.batch_size.")
DTYPES = flags.DEFINE_list("dtypes", [], "Instead of config.model.dtype.")
DEVICE_COUNTS = flags.DEFINE_list(
    "device-counts", [], "Instead of all devices; a CPU acts as so many. startup and memory are of all devices only."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 5.0, "Of each throughput measurement, at least.", lower_bound=0.0)
AGAINST_TORCH = flags.DEFINE_bool("against-torch", False, "Time the same train step in PyTorch beside ours.")
TORCH_PYTHON = flags.DEFINE_string("torch-python", sys.executable, "A Python that has PyTorch.")
OUTPUT = flags.DEFINE_string("output", None, "Write the result to this JSON file.")
flags.register_validator(
    "only", lambda names: names and set(names) <= set(MEASUREMENTS), f"it must be some of {','.join(MEASUREMENTS)}"
)
flags.register_validator("seconds", math.isfinite, "it must be a number of seconds")
for _name in ("batch-sizes", "device-counts"):
    flags.register_validator(
        _name,
        lambda numbers: all(n.isdecimal() and int(n) > 0 for n in numbers),
        "it must be whole numbers from 1, with commas",
    )


def cases_of(config: ConfigDict) -> Iterator[tuple[ConfigDict, int | None]]:
    """Each config to measure, with the number of devices, None for all."""
    batch_sizes = [int(size) for size in BATCH_SIZES.value] or [config.batch_size]
    dtypes = DTYPES.value or [config.model.dtype]
    counts: list[int | None] = [int(count) for count in DEVICE_COUNTS.value] or [None]
    for batch_size, dtype, count in itertools.product(batch_sizes, dtypes, counts):
        yield config_lib.replaced(config, {"batch_size": batch_size, "model.dtype": dtype}), count


def measure_case(config: ConfigDict, num_devices: int | None) -> dict[str, Any]:
    """Measure what the flags ask for of one config on so many devices; a case of the result."""
    import jax

    from benchmarks import measure
    from resnet_jax import setup, train_state
    from resnet_jax.data import datasets

    wanted, repeats = ONLY.value, REPEATS.value
    start = setup.setup(config, num_devices)
    flops = measure.flops_per_image(config, start)
    case = {
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "devices": start.mesh.size,
        "num_params": train_state.num_params(start.state.params),
        "train_flops_per_image": flops,
        "dataset": datasets.describe(start.dataset, start.train, start.validation),
    }
    figures: dict[str, Any] = {}
    if start.mesh.size == jax.device_count():  # first, while this process holds little
        if "startup" in wanted:
            for cache, seconds in measure.startup_seconds(config, repeats).items():
                figures[f"startup_{cache}"] = timing.summary(seconds, "s")
        if "memory" in wanted:
            for where, peak in measure.peak_memory_bytes(config, start).items():
                if peak is not None:
                    figures[f"memory_{where}"] = timing.summary([peak / 1e9], "GB")
    if "save" in wanted:
        figures["save"] = timing.summary(measure.save_seconds(config, start, repeats), "s")
    with ExitStack() as stack:
        contenders = {name: getattr(measure, name)(config, start) for name in THROUGHPUTS if name in wanted}
        if AGAINST_TORCH.value:
            data = len(start.dataset.class_names), start.train.images.shape[1:]
            torch = measure.torch_step(config, *data, shutil.which(TORCH_PYTHON.value) or "")
            contenders["torch_train_step"], case["torch"] = stack.enter_context(torch)
        rates = timing.interleave(contenders, repeats, SECONDS.value)
    for name, repeated in rates.items():
        figures[name] = timing.summary(repeated, "images/s")
        if name.endswith("train_step"):
            figures[f"{name}_flops"] = timing.summary([rate * flops / 1e9 for rate in repeated], "GFLOP/s")
    for one, other in RATIOS:
        if {one, other} <= rates.keys():
            rounds = zip(rates[one], rates[other], strict=True)
            figures[f"{one} / {other}"] = timing.summary([a / b for a, b in rounds], "ratio")
    return case | {"figures": figures}


def table(case: dict[str, Any]) -> Iterator[str]:
    """The lines that show a case to a person."""
    yield (
        f"batch {case['batch_size']}, {case['dtype']}, {case['devices']} device{'s' * (case['devices'] > 1)}: "
        f"{case['num_params']:,} parameters, {case['train_flops_per_image'] / 1e9:.3f} GFLOP to train on an image"
    )
    yield f"{'':<30} {'median':>10} {'min':>10} {'max':>10}"
    for name, figure in case["figures"].items():
        cells = (f"{figure[which]:>10,.{1 if figure['median'] >= 100 else 3}f}" for which in ("median", "min", "max"))
        yield f"{name:<30} {' '.join(cells)} {figure['unit']}"


def check_output(path: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".incomplete-"):
            is_folder = path.is_dir()
    except OSError:
        is_folder = True
    if is_folder:
        raise UserError(f"--output {path}: give a file in a folder that can be written")


def main(config: ConfigDict) -> None:
    """Measure each case, print it and write the result."""
    output = None if OUTPUT.value is None else Path(OUTPUT.value).absolute()
    if output:
        check_output(output)
    if AGAINST_TORCH.value and shutil.which(TORCH_PYTHON.value) is None:
        raise UserError(f"--torch-python {TORCH_PYTHON.value} is not a program: give a Python that has PyTorch")
    cases = list(cases_of(config))
    for case_config, num_devices in cases:
        config_lib.validate(case_config)
        if num_devices:
            config_lib.check_batch_size(case_config.batch_size, num_devices)
    counts = [count for _, count in cases if count]
    if counts:  # before JAX starts
        fake_devices = f"--xla_force_host_platform_device_count={max(counts)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake_devices}".strip()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # for there are other processes on a GPU
    import jax

    from resnet_jax.runs import environment, files

    for _, num_devices in cases:
        if AGAINST_TORCH.value and (num_devices or jax.device_count()) > 1:
            raise UserError("--against-torch compares on one device: give --device-counts=1")
    results = []
    for case_config, num_devices in cases:
        with redirect_stdout(StringIO()):  # what runs print of themselves
            results.append(measure_case(case_config, num_devices))
        print("\n".join(table(results[-1])), flush=True)
        if output:  # after each, so that none is lost with a later one
            result = {"cases": results, "config": config_lib.to_json(config), "environment": environment.collect()}
            files.write_json(output, result)
    if output:
        print(output)


if __name__ == "__main__":
    cli.run(main)
