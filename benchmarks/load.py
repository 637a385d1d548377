"""Measure the CPU seconds of `load` and a first prediction in a new process, with a cold and a warm compilation cache.

python -m benchmarks.load final-cifar10 --output load.json
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import timing, tool
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser, run
from resnet_jax.inference import trained_model

PROGRAMS = {
    "import": "import resnet_jax.inference.trained_model",
    "load": "import sys, numpy; from resnet_jax import load; m = load(sys.argv[1]); "
    "m.predict(numpy.zeros((1, *m.image_shape), numpy.uint8))",
}


def cpu_seconds(program: str, source: str, cache: str) -> float:
    """Return the CPU seconds of a process, of the user and of the system, on all cores."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program, source], check=True, env=env | {"XDG_CACHE_HOME": cache})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.load", __doc__)
    parser.add_argument("source", metavar="SOURCE", help="what `load` takes: a run's workdir, a file or a name")
    parser.add_argument(
        "--repeats", type=command_line.whole_number(1), default=5, help="measurements of each (default: 5)"
    )
    tool.add_output_argument(parser)
    arguments = parser.parse_args(argv)
    tool.check_output(arguments.output)
    model = trained_model.load(arguments.source)
    seconds: dict[str, list[float]] = {"import": [], "load cold": [], "load warm": []}
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name, measured in seconds.items():
                measured.append(cpu_seconds(PROGRAMS[name.split()[0]], arguments.source, cache))
    case = {
        "batch_size": 1,
        "dtype": model.config.model.dtype,
        "devices": 1,
        "figures": {name: timing.summary(measured, "CPU s") for name, measured in seconds.items()},
    }
    tool.write_result(arguments.output, {"cases": [case]}, model.config)


if __name__ == "__main__":
    run(main)
