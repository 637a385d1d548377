"""Measure the speed of a config on this machine.

    python -m resnet_jax benchmark --config configs/final.py --output result.json

For each batch size, dtype and number of devices it measures these, or those of `--only`:

    train_step, eval_step   the step alone, on one batch in the devices' memory, as many steps a call as in training; GFLOP
                            per image as XLA counts them
    pipeline                the training stream alone, beside naive_pipeline: the same augmentation in tf.data, image by image,
                            if it is one that the report has
    draws                   what the host draws for the batches of the device pipeline
    end_to_end              the training loop, from the end of its first step to the end of its last; and its ratio to
                            train_step
    startup                 until launch.py dispatches its first step, with a cold and a warm compilation cache
    save                    how long a checkpoint blocks the loop
    memory                  peak memory of launch.py on the host and, if the backend reports it, on the device

Throughputs are measured after a warm-up, without compilation, and alternately (A B A B); ratios are computed per round.
The table shows the median and the spread. The JSON holds all repeats, the config and the environment.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from typing import Any

from ml_collections import ConfigDict

from benchmarks import timing, tool
from resnet_jax import config as config_lib
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.data.lazy_tensorflow import has_tensorflow
from resnet_jax.disk import files
from resnet_jax.errors import UserError
from resnet_jax.runs import stored_config

THROUGHPUTS = ("train_step", "eval_step", "pipeline", "naive_pipeline", "draws", "end_to_end")
MEASUREMENTS = (*THROUGHPUTS, "startup", "save", "memory")
RATIOS = (
    ("end_to_end", "train_step"),
    ("train_step", "torch_train_step"),
    ("pipeline", "naive_pipeline"),
)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(MEASUREMENTS):
        raise argparse.ArgumentTypeError(f"must be names from {','.join(MEASUREMENTS)}, got {text!r}")
    return names


def _not_naive(config: ConfigDict) -> list[str]:
    """Return the augmentations of a config that `naive_pipeline` lacks: all that the report lacks."""
    values, off = config_lib.flatten(config), stored_config.LATER_FIELDS
    return [name for name in values if name.startswith("augment.") and values[name] != off.get(name, values[name])]


def _parser() -> ArgumentParser:
    parser = ArgumentParser("python -m resnet_jax benchmark", __doc__)
    command_line.add_config_arguments(parser)
    parser.add_argument(
        "--only",
        type=_names,
        metavar="NAMES",
        help="what to measure, separated by commas (default: all that is possible)",
    )
    parser.add_argument("--batch-sizes", type=tool.whole_numbers, metavar="SIZES", help="instead of config.batch_size")
    parser.add_argument("--dtypes", metavar="DTYPES", help="instead of config.model.dtype")
    parser.add_argument(
        "--device-counts",
        type=tool.whole_numbers,
        metavar="COUNTS",
        help="instead of all devices; a CPU simulates that many; startup and memory are measured only on all devices",
    )
    parser.add_argument(
        "--repeats", type=command_line.whole_number(1), default=5, metavar="N", help="repeats of each (default: 5)"
    )
    parser.add_argument(
        "--seconds",
        type=command_line.seconds,
        default=5.0,
        metavar="S",
        help="minimum seconds of each throughput measurement (default: 5)",
    )
    parser.add_argument("--against-torch", action="store_true", help="time the same train step in PyTorch too")
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="a Python that has PyTorch")
    parser.add_argument(
        "--output", type=command_line.local_path, metavar="FILE", help="JSON file to write the result to"
    )
    return parser


def cases_of(config: ConfigDict, arguments: argparse.Namespace) -> Iterator[tuple[ConfigDict, int | None]]:
    """Yield each config to measure and its number of devices, None for all."""
    batch_sizes = arguments.batch_sizes or [config.batch_size]
    dtypes = arguments.dtypes.split(",") if arguments.dtypes else [config.model.dtype]
    counts = arguments.device_counts or [None]
    for batch_size, dtype, count in itertools.product(batch_sizes, dtypes, counts):
        yield config_lib.replaced(config, {"batch_size": batch_size, "model.dtype": dtype}), count


def measure_case(config: ConfigDict, num_devices: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one config on `num_devices` devices, or all if None; return a case of the result."""
    import jax

    from benchmarks import measure
    from resnet_jax import setup, train_state
    from resnet_jax.data import datasets, pipelines

    wanted, repeats = arguments.only, arguments.repeats
    start = setup.setup(config, num_devices)
    config = start.config
    pipelines.check(config, start.train, start.mesh)
    flops = measure.flops_per_image(config, start.train, start.state, len(start.dataset.class_names))
    case = {
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "pipeline": config.pipeline,
        "devices": start.mesh.size,
        "num_params": train_state.num_params(start.state.params),
        "train_flops_per_image": flops,
        "dataset": datasets.describe(start.dataset, start.train, start.validation),
    }
    figures: dict[str, Any] = {}
    if start.mesh.size == jax.device_count():  # first, while this process uses little memory
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
        if arguments.against_torch:
            data = len(start.dataset.class_names), start.train.images.shape[1:]
            torch = measure.torch_step(config, *data, arguments.torch_python)
            contenders["torch_train_step"], case["torch"] = stack.enter_context(torch)
        rates = timing.interleave(contenders, repeats, arguments.seconds)
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
    """Yield the lines of the table of a case."""
    yield (
        f"batch {case['batch_size']}, {case['dtype']}, {case['devices']} device{'s' * (case['devices'] > 1)}: "
        f"{case['num_params']:,} parameters, {case['train_flops_per_image'] / 1e9:.3f} GFLOP per training image"
    )
    yield f"{'':<30} {'median':>10} {'min':>10} {'max':>10}"
    for name, figure in case["figures"].items():
        cells = (f"{figure[which]:>10,.{1 if figure['median'] >= 100 else 3}f}" for which in ("median", "min", "max"))
        yield f"{name:<30} {' '.join(cells)} {figure['unit']}"


def main(argv: Sequence[str]) -> None:
    """Run the tool `benchmark`: measure each case, print it and write the result."""
    arguments, config = command_line.parse_config(_parser(), argv)
    lacking = _not_naive(config)
    arguments.only = arguments.only or [
        name for name in MEASUREMENTS if name != "naive_pipeline" or (has_tensorflow() and not lacking)
    ]
    if lacking and "naive_pipeline" in arguments.only:
        raise UserError(f"naive_pipeline cannot be compared, because it has no {lacking[0]}: leave it out of --only")
    output = arguments.output and arguments.output.absolute()
    if output:
        tool.check_output(output)
    if arguments.against_torch:
        arguments.torch_python = tool.find_torch_python(arguments.torch_python)
    if arguments.against_torch and config.optim.name.startswith("muon"):
        raise UserError("--against-torch cannot time Muon, which PyTorch lacks for convolutions: set config.optim.name")
    cases = list(cases_of(config, arguments))
    for case_config, num_devices in cases:
        config_lib.validate(case_config)
        if num_devices:
            config_lib.check_batch_size(case_config, num_devices)
    counts = [count for _, count in cases if count]
    if counts:  # before JAX starts
        fake_devices = f"--xla_force_host_platform_device_count={max(counts)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fake_devices}".strip()
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms.split(","):
        os.environ["JAX_PLATFORMS"] = f"{platforms},cpu"  # for which operations are counted
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # because other processes use the GPU too
    import jax

    for _, num_devices in cases:
        if arguments.against_torch and (num_devices or jax.device_count()) > 1:
            raise UserError("--against-torch needs one device: give --device-counts=1")
    results = []
    for case_config, num_devices in cases:
        with redirect_stdout(StringIO()):  # hides the output of the runs
            results.append(measure_case(case_config, num_devices, arguments))
        print("\n".join(table(results[-1])), flush=True)
        if output:  # after each case, so that a later failure loses none
            files.write_json(output, tool.described({"cases": results}, config))
    if output:
        print(output)
