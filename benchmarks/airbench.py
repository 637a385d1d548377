"""Measure how fast `configs/speedrun.py` trains beside airbench94_muon in PyTorch, in turns on one machine.

    git clone https://github.com/KellerJordan/cifar10-airbench
    python -m benchmarks.airbench cifar10-airbench --torch-python=PYTHON --output results/airbench-cpu.json

The networks differ, and so do the epochs, 8 there. So two ratios are computed in each round: of the time that one
training image takes, and of the time of all training images of all epochs. Below 1, `speedrun.py` is faster.
"""

import sys
from collections.abc import Sequence

import jax

from benchmarks import measure, timing, tool
from resnet_jax import setup
from resnet_jax.cli import command_line
from resnet_jax.cli.command_line import ArgumentParser
from resnet_jax.errors import UserError

THEIR_EPOCHS = 8


def main(argv: Sequence[str]) -> None:
    """Run the tool."""
    parser = ArgumentParser("python -m benchmarks.airbench", __doc__)
    parser.add_argument(
        "clone", type=command_line.local_path, metavar="CLONE", help="a clone of KellerJordan/cifar10-airbench"
    )
    parser.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="a Python that has PyTorch")
    parser.add_argument("--repeats", type=command_line.whole_number(1), default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--seconds", type=command_line.seconds, default=10.0, help="minimum seconds of each measurement (default: 10)"
    )
    tool.add_output_argument(parser)
    arguments = parser.parse_args(argv)
    file = arguments.clone / "airbench94_muon.py"
    if not file.is_file():
        raise UserError(f"{arguments.clone} holds no airbench94_muon.py: give a clone of KellerJordan/cifar10-airbench")
    python = tool.find_torch_python(arguments.torch_python)
    if jax.default_backend() != "cpu":
        raise UserError("airbench94 is measured on a CPU here: set JAX_PLATFORMS=cpu")
    tool.check_output(arguments.output)
    start = setup.setup(command_line.load_config("configs/speedrun.py"), 1)
    config = start.config
    spec = {"source": file.read_text("utf-8")}
    with measure.in_torch("benchmarks.airbench_step", spec, python) as (theirs, about):
        ours = measure.end_to_end(config, start)
        rates = timing.interleave({"speedrun": ours, "airbench94": theirs}, arguments.repeats, arguments.seconds)
    of_image = [their / our for our, their in zip(rates["speedrun"], rates["airbench94"], strict=True)]
    of_all = [ratio * config.num_epochs / THEIR_EPOCHS for ratio in of_image]
    case = {
        "batch_size": config.batch_size,
        "dtype": config.model.dtype,
        "devices": 1,
        "figures": {name: timing.summary(repeats, "images/s") for name, repeats in rates.items()}
        | {
            "time of an image / airbench94's": timing.summary(of_image, "ratio"),
            "time of all epochs / airbench94's": timing.summary(of_all, "ratio"),
        },
    }
    tool.write_result(arguments.output, {"cases": [case], "torch": about}, config)


if __name__ == "__main__":
    command_line.run(main)
